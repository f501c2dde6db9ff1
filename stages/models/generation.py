"""Generation defaults of a checkpoint, normalised: special token ids, what stops generation, sampling parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.models.record import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")


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
                problems.append(f"{key} = {value!r}; expected token ids")
                return []
            if vocab_size and token >= vocab_size:
                problems.append(f"{key} = {value!r} is outside the model's vocabulary of {vocab_size} rows")
                return []
        return values

    def special(key: str) -> list[int]:
        value = settings.get(key)
        return ids(key, config.get(key) if value is None else value)

    bos, eos, pad = special("bos_token_id"), special("eos_token_id"), special("pad_token_id")
    stop, skipped = [*eos], []
    words = settings.get("stop_words_ids")
    if words is not None and not (isinstance(words, list) and all(isinstance(word, list) for word in words)):
        problems.append(f"stop_words_ids = {words!r}; expected a list of lists of token ids")
        words = None
    for word in words or []:
        if len(ids("stop_words_ids", word)) == 1:
            stop.append(word[0])
        elif word:
            skipped.append(word)
    chat_format = settings.get("chat_format")
    if chat_format is not None and not isinstance(chat_format, str):
        problems.append(f"chat_format = {chat_format!r}; expected a name")
    sampling = {key: settings[key] for key in SAMPLING if settings.get(key) is not None}
    problems += [f"{k} = {v!r}; expected a number" for k, v in sampling.items() if not isinstance(v, int | float)]
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
