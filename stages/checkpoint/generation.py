"""Generation defaults of a checkpoint, normalised: special token ids, what stops generation, sampling parameters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.strict_json import shown
from stages.problems import capped

if TYPE_CHECKING:
    from collections.abc import Callable

    from stages.documents.files import JsonObject
    from stages.documents.model import GenerationDefaults

CONFIG, GENERATION = "config.json", "generation_config.json"
# What transformers takes for each, and what a message says of anything else.
SAMPLING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number, at least 0"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "top_k": (lambda value: type(value) is int and value >= 0, "a whole number, at least 0"),
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "max_new_tokens": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
}


def normalise(settings: JsonObject, config: JsonObject, vocab_size: int) -> tuple[GenerationDefaults, list[str]]:
    """Return generation.json, and a sentence for each setting of the checkpoint that it leaves out.

    ``settings`` is a raw generation_config.json ({} if there is none), ``config`` the raw config.json that older
    checkpoints keep their token ids in; its sampling defaults count for nothing, as for transformers, and its
    eos_token_id ends a text beside the others. Ids outside the
    model's vocabulary (``vocab_size`` rows; 0: unknown, not checked) are left out: no such token is ever generated.
    """
    problems: list[str] = []
    notes: list[str] = []

    def ids(file: str, key: str, value: Any) -> list[int]:
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int for token in values):
            problems.append(f"{file}: {key} = {shown(value)}; expected token ids")
            return []
        known = [token for token in values if token >= 0 and (token < vocab_size or not vocab_size)]
        for token in sorted(set(values) - set(known))[:1]:
            rows = f" of {vocab_size} rows" if vocab_size else ""
            notes.append(f"{file}: {key} = {shown(token)} is outside the model's vocabulary{rows} and is left out")
        return known

    def special(key: str) -> list[int]:
        file = GENERATION if settings.get(key) is not None else CONFIG
        return ids(file, key, (settings if file == GENERATION else config).get(key))

    bos, eos, pad = special("bos_token_id"), special("eos_token_id"), special("pad_token_id")
    if settings.get("eos_token_id") is not None:  # an end that only config.json names ends a text too
        eos = list(dict.fromkeys([*eos, *ids(CONFIG, "eos_token_id", config.get("eos_token_id"))]))
    words = settings.get("stop_words_ids")
    if words is not None and not (isinstance(words, list) and all(isinstance(word, list) for word in words)):
        problems.append(f"{GENERATION}: stop_words_ids = {shown(words)}; expected a list of lists of token ids")
        words = None
    words = [word for word in words or [] if ids(GENERATION, "stop_words_ids", word) == word]
    notes += [
        f"{GENERATION}: the stop sequence {shown(word)} has several ids; only single ids stop generation"
        for word in words
        if len(word) > 1
    ]
    chat_format = settings.get("chat_format")
    if chat_format is not None and not isinstance(chat_format, str):
        problems.append(f"{GENERATION}: chat_format = {shown(chat_format)}; expected a name")
    sampling = _sampling(settings, problems, notes)
    if problems:
        raise ConfigError(*capped(problems))
    return {
        "schema": 1,
        "bos": bos[0] if bos else None,
        "eos": eos,
        "pad": pad[0] if pad else None,
        "stop": list(dict.fromkeys([*eos, *(word[0] for word in words if len(word) == 1)])),
        "chat_format": chat_format,
        "sampling": sampling,
    }, capped(notes)


def _sampling(settings: JsonObject, problems: list[str], notes: list[str]) -> dict[str, float | bool]:
    """Return the sampling defaults; a number out of range, such as a top_k of -1, is left out and noted."""
    sampling: dict[str, float | bool] = {}
    for key, (accepts, wanted) in SAMPLING.items():
        value = settings.get(key)
        if value is None:
            continue
        problem = f"{GENERATION}: {key} = {shown(value)}; expected {wanted}"
        if accepts(value):
            sampling[key] = value
        elif _is_number(value):
            notes.append(f"{problem}; it is left out")
        else:
            problems.append(problem)
    return sampling


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
