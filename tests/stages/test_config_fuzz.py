"""Every value of config.json and generation_config.json replaced by ones of other types: a message, no traceback."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

from stagegraph.stage import StageError
from stages.config_parse import ConfigParse
from stages.models import FAMILIES, TRACED, load_family
from tests.support.checkpoints import write_hollow, write_json
from tests.support.local_context import run_stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

JUNK: list[Any] = [None, True, 0, -1.5, 10**30, "\x1b[31m", [], [None, {}], {"a": [1]}]
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0,
    "id2label": {"0": "LABEL_0"}, "torch_dtype": "float16", "mystery": {"a": 1},
}  # fmt: skip
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 64}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_parameters": ROPE},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 64, "rope_theta": 1e4},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "layer_types": ["full_attention"]},
    "qwen3": {"num_key_value_heads": 2, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "gpt_neox": {"rotary_pct": 1.0, "rotary_emb_base": 10000},
    "qwen": {"seq_length": 128, "kv_channels": 16},
    "rwkv": {},
}
GENERATION = {
    "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.8,
    "top_k": 20, "repetition_penalty": 1.1, "max_new_tokens": 100, "chat_format": "chatml",
    "stop_words_ids": [[2], [3, 4]], "transformers_version": "4.31.0",
}  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *rest) for rest in places(inner))


def mutants(document: dict[str, Any], *others: str) -> Iterator[dict[str, Any]]:
    """Yield ``document`` with one value of another kind, and with one of ``others`` added."""
    for path in [*places(document), *((key,) for key in others)]:
        for junk in JUNK:
            mutant = copy.deepcopy(document)
            *outer, last = path
            holder: Any = mutant
            for key in outer:
                holder = holder[key]
            holder[last] = junk
            yield mutant


def judged(checkpoint: Path, out: Path) -> bool:
    """Say whether config-parse takes ``checkpoint``; either its documents are whole or it says what is wrong."""
    problems: Sequence[str] | None = None
    try:
        ctx = run_stage(ConfigParse(), out, {"checkpoint": str(checkpoint)})
    except StageError as error:
        problems = error.problems
    if problems is not None:
        assert 0 < len(problems) < 30
        assert all(problem and len(problem) < 400 and problem.isprintable() for problem in problems), problems
        return False
    model, generation, _ = (
        json.loads((out / name).read_text()) for name in ("model.json", "generation.json", "tensors.json")
    )
    config = load_family(model["family"]).config(**model["config"])
    assert load_family(model["family"]).params(config)
    assert all(type(token) is int and 0 <= token < config.vocab_size for token in generation["stop"])
    assert all(len(line) < 300 and line.isprintable() for line in ctx.views["config"].splitlines())
    return True


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != TRACED])
def test_any_value_of_config_json(family, tmp_path):
    base = {"model_type": family, **SIZES, **BASES[family]}
    checkpoint = write_hollow(tmp_path / "checkpoint", base)
    assert judged(checkpoint, tmp_path / "out")
    absent = sorted(load_family(family).keys.keys() - base.keys())
    taken = 0
    for mutant in mutants(base, *absent, "\x1b[31m"):
        write_json(checkpoint / "config.json", mutant)
        taken += judged(checkpoint, tmp_path / "out")
    assert taken, "what is ignored may have any value"


def test_any_value_of_generation_config_json(tmp_path):
    checkpoint = write_hollow(tmp_path / "checkpoint", {"model_type": "llama", **SIZES, **BASES["llama"]})
    write_json(checkpoint / "generation_config.json", GENERATION)
    assert judged(checkpoint, tmp_path / "out")
    for mutant in mutants(GENERATION):
        write_json(checkpoint / "generation_config.json", mutant)
        judged(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "text", [b"", b"[]", b'"x"', b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000]
)
def test_any_text_in_place_of_an_object(name, text, tmp_path):
    checkpoint = write_hollow(tmp_path / "checkpoint", {"model_type": "llama", **SIZES, **BASES["llama"]})
    (checkpoint / name).write_bytes(text)
    assert judged(checkpoint, tmp_path / "out") == name.startswith("model.")  # which the whole file outweighs
