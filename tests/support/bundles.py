"""Bundles of a tiny random Qwen made through the stages, and ways to spoil them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from stages import profiles
from stages.bundle import Bundle
from stages.config_parse import ConfigParse
from stages.documents.files import write_json
from stages.packing import assemble
from stages.param_register import ParamRegister
from stages.quantize import Quantize
from stages.runtime import seal
from stages.runtime.session import Session
from stages.runtime.tokenizer import BundleTokenizer
from stages.tokenizer_bundle import TokenizerBundle
from stages.verification import live
from stages.verification.reference import checkpoint_digest
from stages.verify import Verify
from tests.support.checkpoints import write_qwen, write_raw_safetensors
from tests.support.compiled_qwen import Registered, build_graphs, compile_library
from tests.support.local_context import Elsewhere, LocalContext, run_stage, source_files

INCLUDE = Verify.Params.__dataclass_fields__["checkpoint"].metadata["include"]


@dataclass(frozen=True)
class Built:
    """One bundle with the artifacts that verify reads beside it."""

    folder: Path
    checkpoint: Path
    scheme: str
    config: Path
    params: Path
    report: Path
    bundle: Path

    def copy(self, folder: Path) -> Built:
        """A copy that may be spoilt."""
        shutil.copytree(self.bundle, folder / "bundle")
        shutil.copy(self.params, folder / "params.json")
        return replace(self, bundle=folder / "bundle", params=folder / "params.json")

    def sign(self) -> None:
        """Make bundle.json name the files as they are now, as an unlucky build would have."""
        document = json.loads((self.bundle / "bundle.json").read_text())
        found = assemble.files(self.bundle)
        document["files"] = {name: found[name] for name in document["files"]}
        self._write(document)

    def edit(self, change: Any) -> None:
        """Let ``change`` alter bundle.json's document."""
        document = json.loads((self.bundle / "bundle.json").read_text())
        change(document)
        self._write(document)

    def _write(self, document: Any) -> None:
        write_json(self.bundle / "bundle.json", {**document, seal.KEY: seal.seal(document)})


def build(
    folder: Path,
    scheme: str,
    *,
    checkpoint: Path | None = None,
    target: str = "llvm",
    activations: str = "float",
    **options: Any,
) -> Built:
    """Run every stage up to bundle; a ``target`` of cuda is a label on code for the processor."""
    profiles.compiler()
    checkpoint = checkpoint or write_qwen(folder / "checkpoint")
    run_stage(ConfigParse(), folder / "config", {"checkpoint": str(checkpoint)})
    parsed = {name: folder / "config" / out.path for name, out in ConfigParse.outputs.items()}
    run_stage(TokenizerBundle(), folder / "tokenizer", {"checkpoint": str(checkpoint)}, parsed)
    choice = {"scheme": scheme, "target": "llvm"}
    run_stage(ParamRegister(), folder / "params", choice, {key: parsed[key] for key in ("config", "tensors")})
    params = folder / "params" / "params.json"
    stored = {"params": params, "tensors": parsed["tensors"]}
    run_stage(Quantize(), folder / "quantize", {**choice, "checkpoint": str(checkpoint)}, stored)
    registered = Registered(parsed["config"], params)
    graphs, choices = build_graphs(folder, registered, "llvm", **options), {"activations": activations}
    compile_library(folder / "compile", graphs, registered, target="llvm", **choices)
    inputs = {
        "library": folder / "compile" / "model.so",
        "metadata": folder / "compile" / "metadata.json",
        "weights": folder / "quantize" / "weights",
        "tokenizer": folder / "tokenizer" / "tokenizer",
        "config": parsed["config"],
        "generation": parsed["generation"],
    }
    run_stage(Bundle(), folder / "bundle", {"target": target, "name": "tiny"}, inputs)
    report = folder / "quantize" / "report.json"
    return Built(folder, checkpoint, scheme, parsed["config"], params, report, folder / "bundle" / "bundle")


# Random weights lose more than trained ones, all of it of no meaning.
ANY_LOSS = {"max_kl": 100.0, "min_top1": 0.0, "max_ppl_ratio": 100.0}


def verify(
    built: Built, out: Path, memo: Path | None = None, elsewhere: Elsewhere | None = None, **params: Any
) -> LocalContext:
    params = {"checkpoint": str(built.checkpoint), "target": "llvm", "probe_tokens": 256, **ANY_LOSS, **params}
    inputs = {"bundle": built.bundle, "params": built.params, "config": built.config, "report": built.report}
    return run_stage(Verify(), out, params, inputs, memo, elsewhere)


def record(built: Built) -> None:
    """Write reference/ next to the checkpoint of ``built`` from what transformers computes now."""
    import torch

    tokenizer = BundleTokenizer(built.bundle)
    prompt, greeting = "The old lighthouse keeper walked slowly down. " * 8, "every morning"
    request = live.LiveRequest(
        bundle=built.bundle,
        params=built.params,
        config=built.config,
        tokens=(),
        arithmetic="float32",
        int8_cache=False,
        continued=(),
        active_vocab_size=tokenizer.active_vocab_size,
    )
    with live.loaded(request) as (model, *_):
        spare = range(tokenizer.active_vocab_size, model.config.vocab_size)
        options = {"eos_token_id": None, "suppress_tokens": [*spare] or None}

        def continued(ids: list[int], count: int) -> list[int]:
            found = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, **options)
            return found[0].tolist()  # type: ignore[no-any-return]

        tokens = continued(tokenizer.encode(prompt)[:64], 64)
        with torch.inference_mode():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
        greeted = tokenizer.encode(greeting)
        ids = continued(greeted, 24)[len(greeted) :]
    (built.checkpoint / "reference").mkdir()
    script = built.checkpoint / "record_reference.py"
    script.write_text("# stands for the script that makes a recording\n")
    write_array(built.checkpoint / "reference" / "reference.safetensors", "logits", logits)
    case = {
        "scheme": built.scheme,
        "prompt": prompt,
        "tokens": tokens,
        "logits": "logits",
        "continuations": [{"prompt": greeting, "ids": ids, "text": tokenizer.decode(ids)}],
    }
    document = {
        "schema": 1,
        "checkpoint_digest": checkpoint_digest(source_files(built.checkpoint, INCLUDE).digests),
        "script": {"name": script.name, "digest": blake3(script.read_bytes()).hexdigest()},
        "versions": {"transformers": "5"},
        "cases": [case],
    }
    (built.checkpoint / "reference" / "reference.json").write_text(json.dumps(document))


def text_alone(session: Session, tokenizer: BundleTokenizer, ids: list[int], count: int) -> str:
    """Continue ids greedily, token by token, with nothing but a session: what every other way must say."""
    sequence, stream = session.add(), tokenizer.stream(ids)
    logits, text = session.prefill(sequence, ids), ""
    for left in reversed(range(count)):
        token = int(logits[: tokenizer.active_vocab_size].argmax())
        if token in tokenizer.stop:
            break
        text += stream.step(token)
        if not left or session.full(sequence):
            break
        logits = session.decode(sequence, token)
    session.remove(sequence)
    return text + stream.finish()


def write_array(path: Path, name: str, array: np.ndarray) -> None:
    data = np.ascontiguousarray(array, "<f4").tobytes()
    header = {name: {"dtype": "F32", "shape": [*array.shape], "data_offsets": [0, len(data)]}}
    write_raw_safetensors(path, json.dumps(header).encode(), data)
