"""Record what the example checkpoint must compute: reference/reference.{json,safetensors}.

The reference is transformers' Qwen2ForCausalLM in float32, without a key-value cache, on the checkpoint's weights: as
stored (q0f32), or quantized and dequantized (q4*), where only the arithmetic after dequantization is independent.

A case holds 64 tokens of a held-out story and 64 greedily decoded ones with the logits behind each of them, and greedy
continuations of text/prompts.json. No greedy choice in it is close, so that rounding cannot excuse another text.

    python examples/tiny-qwen/record_reference.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from blake3 import blake3
from qwen1 import HERE, load_qwen2, load_tensors
from safetensors.torch import save_file
from vocabulary import END_OF_TEXT, TEXT, decode, encode, encoding, read_text

from stages.models import load_family
from stages.models.transforms import apply, invert
from stages.quantization.group import dequantize, quantize
from stages.quantization.schemes import SCHEMES

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

# Which schemes are recorded, and whether with logits (0.95 MB each; the example is to stay below 6 MB).
CASES = {"q0f32": True, "q4f32_1": True, "q4f16_1": False}
PROMPT_TOKENS, NEW_TOKENS, CONTINUATION_TOKENS = 64, 64, 48
MARGIN = 5e-3  # between the two best logits, some fifty times what float32 implementations differ by
CHECKPOINT_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    *("*.safetensors", "*.safetensors.index.json", "*.tiktoken"),
)


class NotDecisiveError(Exception):
    """A greedy continuation that ends early or contains a choice between near equals."""


def file_digest(path: Path) -> str:
    """Return the BLAKE3 digest of a file."""
    return blake3(path.read_bytes()).hexdigest()


def checkpoint_digest(directory: Path) -> str:
    """Return the digest of everything that determines what the checkpoint computes: BLAKE3 over names and digests."""
    files = {path.name: file_digest(path) for pattern in CHECKPOINT_FILES for path in directory.glob(pattern)}
    return blake3(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def as_stored(tensors: dict[str, torch.Tensor], scheme_name: str) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors as they are after a quantization scheme, in float32."""
    scheme = SCHEMES[scheme_name]
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    if scheme.kind == "group":
        family = load_family("qwen")
        for param in family.params(family.parse(json.loads((HERE / "config.json").read_text()))):
            array = apply(param.transform, [arrays[source] for source in param.sources])
            if scheme.quantizes(param.kind):
                array = dequantize(*quantize(array, scheme), scheme, array.shape[1])
            else:
                array = array.astype(scheme.storage_dtype).astype("float32")
            arrays |= zip(param.sources, invert(param.transform, array, param.source_shapes), strict=True)
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


@torch.no_grad()
def greedy(model: Qwen2ForCausalLM, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Return `count` greedily decoded ids and the logits [len(prompt) + count, V] behind every token."""
    ids = list(prompt)
    end = encoding().encode_single_token(END_OF_TEXT)
    for _ in range(count):
        best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        margin = (best.values[0] - best.values[1]).item()
        if margin < MARGIN or best.indices[0] == end:
            raise NotDecisiveError(f"{decode(ids)!r} is followed by {decode([int(best.indices[0])])!r}, {margin=:.4f}")
        ids.append(int(best.indices[0]))
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ids[len(prompt) :]
    return ids[len(prompt) :], logits.contiguous()


def encode_prompt(text: str) -> list[int]:
    """Return the ids of a prompt; they must stand for exactly this text."""
    ids = encode(text)
    assert decode(ids) == text
    return ids


def story_beginnings() -> list[str]:
    """Return the first PROMPT_TOKENS tokens of each held-out story that is long enough, where they are whole text."""
    stories = read_text("heldout.txt").split(f"\n{END_OF_TEXT}\n")
    cut = [encode(story)[:PROMPT_TOKENS] for story in stories]
    return [decode(ids) for ids in cut if len(ids) == PROMPT_TOKENS and encode(decode(ids)) == ids]


def choose_beginning(models: dict[str, Qwen2ForCausalLM]) -> str:
    """Return the first story beginning that every model continues decisively."""
    for text in story_beginnings():
        try:
            for model in models.values():
                greedy(model, encode(text), NEW_TOKENS)
        except NotDecisiveError:
            continue
        return text
    raise NotDecisiveError("no held-out story is continued decisively by all models")


def main() -> None:
    """Compute all cases and write them with the digests and versions they depend on."""
    torch.set_num_threads(2)
    prompts = json.loads((TEXT / "prompts.json").read_text(encoding="utf-8"))
    tensors = load_tensors()
    models = {scheme: load_qwen2(as_stored(tensors, scheme)) for scheme in CASES}
    beginning = choose_beginning(models)
    cases, recorded = [], {}
    for scheme, model in models.items():
        ids = encode_prompt(beginning)
        new, logits = greedy(model, ids, NEW_TOKENS)
        continuations = []
        for prompt in prompts:
            continued, _ = greedy(model, encode_prompt(prompt), CONTINUATION_TOKENS)
            continuations.append({"prompt": prompt, "ids": continued, "text": decode(continued)})
        name = f"{scheme}.logits" if CASES[scheme] else None
        if name:
            recorded[name] = logits
        cases.append(
            {"scheme": scheme, "prompt": beginning, "tokens": ids + new, "logits": name, "continuations": continuations}
        )
    folder = HERE / "reference"
    folder.mkdir(exist_ok=True)
    save_file(recorded, folder / "reference.safetensors")
    script = Path(__file__)
    document = {
        "schema": 1,
        "checkpoint_digest": checkpoint_digest(HERE),
        "script": {"name": script.name, "digest": file_digest(script)},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "safetensors")},
        "cases": cases,
    }
    text = json.dumps(document, ensure_ascii=False, indent=1)
    (folder / "reference.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
