"""Generation defaults of a checkpoint, normalised: special token ids, what stops generation, sampling parameters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from stages.models.record import ConfigError
from stages.models.strict_json import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# What transformers takes for each, and what a message says of anything else.
SAMPLING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number, at least 0"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "top_k": (lambda value: type(value) is int and value >= 0, "a whole number, at least 0"),
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "max_new_tokens": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
}


def normalise(
    settings: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """Return the normalised document and the stop sequences left out because they have several ids.

    ``settings`` is a raw generation_config.json ({} if there is none), ``config`` the raw config.json that older
    checkpoints keep their token ids in. Ids must be below ``vocab_size`` (0: unknown, not checked).
    """
    problems: list[str] = []

    def ids(key: str, value: Any) -> list[int]:
        values = value if isinstance(value, list) else [] if value is None else [value]
        for token in values:
            if type(token) is not int or token < 0:
                problems.append(f"{key} = {shown(value)}; expected token ids")
                return []
            if vocab_size and token >= vocab_size:
                problems.append(f"{key} = {shown(value)} is outside the model's vocabulary of {vocab_size} rows")
                return []
        return values

    def special(key: str) -> list[int]:
        value = settings.get(key)
        return ids(key, config.get(key) if value is None else value)

    bos, eos, pad = special("bos_token_id"), special("eos_token_id"), special("pad_token_id")
    stop, skipped = [*eos], []
    words = settings.get("stop_words_ids")
    if words is not None and not (isinstance(words, list) and all(isinstance(word, list) for word in words)):
        problems.append(f"stop_words_ids = {shown(words)}; expected a list of lists of token ids")
        words = None
    for word in words or []:
        if len(ids("stop_words_ids", word)) == 1:
            stop.append(word[0])
        elif word:
            skipped.append(word)
    chat_format = settings.get("chat_format")
    if chat_format is not None and not isinstance(chat_format, str):
        problems.append(f"chat_format = {shown(chat_format)}; expected a name")
    sampling = {key: settings[key] for key in SAMPLING if settings.get(key) is not None}
    for key, value in sampling.items():
        accepts, wanted = SAMPLING[key]
        if not accepts(value):
            problems.append(f"{key} = {shown(value)}; expected {wanted}")
    if problems:
        raise ConfigError(*(f"generation_config.json: {problem}" for problem in problems))
    return {
        "schema": 1,
        "bos": bos[0] if bos else None,
        "eos": eos,
        "pad": pad[0] if pad else None,
        "stop": list(dict.fromkeys(stop)),
        "chat_format": chat_format,
        "sampling": sampling,
    }, skipped


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
