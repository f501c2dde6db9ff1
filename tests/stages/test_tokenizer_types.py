"""Every value of every tokenizer file, given as another type: a message or a bundle, and never an error of Python's."""

from __future__ import annotations

import copy
import random
import traceback
from pathlib import Path
from typing import Any

import pytest

from stages.tokenizers import load_tokenizer_family
from stages.tokenizers.emission import emit
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.proof import equality as proof
from stages.tokenizers.proof.checks import examine
from stages.tokenizers.reference.automatic import Automatic
from stages.tokenizers.resolution import resolve
from stages.tokenizers.tokenizer_family import ModelFacts
from tests.support.tokenizer_folders import FOLDERS, SIZE, added, tables, tekken, with_class, write_folder

OTHERS: tuple[Any, ...] = (None, True, -1, 1.5, "x", "", [], [None], {}, {"x": None})
FACTS = ModelFacts(
    embedding="e",
    rows=SIZE + 64,
    vocab_size=SIZE + 64,
    context_window=64,
    bos=None,
    eos=(1,),
    pad=None,
    stop=(1,),
    chat_format=None,
)
STATED = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"content": "<|endoftext|>", "lstrip": False, "special": True},
    "eos_token": "<|endoftext|>",
    "add_bos_token": True,
    "add_prefix_space": False,
    "additional_special_tokens": ["<|padding|>"],
    "auto_map": {"AutoTokenizer": ["a.B", None]},
    "chat_template": [{"name": "default", "template": "x"}],
    "added_tokens_decoder": {str(SIZE): {"content": "<|endoftext|>", "special": True, "normalized": False}},
    "legacy": False,
}
MAP = {"eos_token": {"content": "<|endoftext|>", "normalized": False}, "additional_special_tokens": ["<|padding|>"]}
FILES: dict[str, dict[str, Any]] = {
    "tokenizer.json": {"tokenizer.json": tables(added_tokens=added("<|endoftext|>", "<|padding|>"))},
    "tokenizer_config.json": {**with_class("PreTrainedTokenizerFast", tables()), "tokenizer_config.json": STATED},
    "special_tokens_map.json": {"tokenizer.json": tables(), "special_tokens_map.json": MAP},
    "added_tokens.json": {"tokenizer.json": tables(), "added_tokens.json": {"<|x|>": SIZE + 10}},
    "tekken.json": {"tekken.json": tekken()},
}
BESIDE = {
    "a sentencepiece model": {**FOLDERS["sentencepiece"][0], "tokenizer_config.json": STATED},
    "ranks of Llama 3": {**FOLDERS["llama3 model"][0], "tokenizer_config.json": STATED},
    "vocab and merges": {
        **FOLDERS["qwen2 vocab"][0],
        "tokenizer_config.json": {**STATED, "tokenizer_class": "Qwen2Tokenizer"},
    },
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value; of long tables three entries stand for all."""
    found = [path]
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items if len(items) <= 30 else (items[0], items[len(items) // 2], items[-1]):
        found += places(inner, (*path, key))
    return found


def changed(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    copied = copy.copy(value)
    copied[path[0]] = changed(value[path[0]], path[1:], other)
    return copied


def read(folder: Path, files: dict[str, Any]) -> None:
    """What the stage does up to the proof."""
    checkpoint, out = write_folder(folder, files), folder / "out"
    resolution = resolve(checkpoint, {name: checkpoint / name for name in files})
    family = load_tokenizer_family(resolution.family)
    tokenizer = None if family.by_transformers else family.convert(resolution)
    reference = family.reference(resolution)
    tokenizer = reference.tokenizer() if isinstance(reference, Automatic) else tokenizer
    family.warnings(resolution)
    print_of = proof.fingerprint(reference)
    emit(out, tokenizer, family=family, facts=FACTS, resolution=resolution, fingerprint=print_of)
    examine(out, FACTS, resolution.declared, resolution.roles)


def cases(name: str, files: dict[str, Any], file: str, count: int | None) -> list[tuple[str, dict[str, Any]]]:
    whole = [(place, other) for place in places(files[file]) for other in OTHERS]
    chosen = whole if count is None else random.Random(7).sample(whole, min(count, len(whole)))  # noqa: S311
    return [(f"{name}: {at} = {other!r}", {**files, file: changed(files[file], at, other)}) for at, other in chosen]


def run(tmp_path: Path, found: list[tuple[str, dict[str, Any]]]) -> None:
    """Anything but :class:`TokenizerError` is a fault of ours; all of them are told at once."""
    tmp_path.mkdir(exist_ok=True)
    faults = []
    for number, (label, files) in enumerate(found):
        try:
            read(tmp_path / str(number), files)
        except TokenizerError as error:
            if not 1 <= len(error.problems) <= 21 or max(map(len, error.problems)) > 2_000:
                faults.append(f"{label}: {len(error.problems)} problems of {len(str(error))} characters")
        except Exception as error:  # noqa: BLE001 - what is looked for
            at = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(f"{label}: {type(error).__name__}: {error} at {at.filename}:{at.lineno}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("file", FILES)
def test_a_value_of_another_type_is_a_message(tmp_path, file):
    run(tmp_path, cases(file, FILES[file], file, 6))


@pytest.mark.parametrize("name", BESIDE)
def test_a_value_of_another_type_beside_any_vocabulary_is_a_message(tmp_path, name):
    run(tmp_path, cases(name, BESIDE[name], "tokenizer_config.json", 12))


@pytest.mark.slow
def test_every_value_of_every_file_as_every_other_type(tmp_path):
    for file, files in FILES.items():
        run(tmp_path / file, cases(file, files, file, None))
    for name, files in BESIDE.items():
        run(tmp_path / name, cases(name, files, "tokenizer_config.json", None))
