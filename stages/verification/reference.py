"""The reference outputs that a bundle is compared with, and the file next to a checkpoint that records them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from stages.checkpoint import strict_json
from stages.checkpoint.safetensors import read_header
from stages.problems import ProblemsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

RECORD, TENSORS = "reference/reference.json", "reference/reference.safetensors"
_CHECKPOINT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".tiktoken", ".gguf")
_CHECKPOINT_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Continuation:
    """A text and its ids, the ids of its greedy continuation, and that continuation as text.

    ``note`` tells it from another continuation of the same text.
    """

    prompt: str
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    text: str
    note: str = ""


@dataclass(frozen=True)
class Reference:
    """``tokens`` are the ``prompt_length`` ids of ``prompt`` and its greedy continuation.

    Row i of ``logits`` float32 [n, V] is what follows ``tokens[: i + 1]``; None where a recording has none.
    """

    origin: str
    prompt: str
    prompt_length: int
    tokens: Sequence[int]
    logits: np.ndarray | None
    continuations: Sequence[Continuation]


class RecordingError(ProblemsError):
    """A recording that cannot be used; ``problems`` holds every reason."""


def checkpoint_digest(digests: Mapping[str, str]) -> str:
    """Return the digest of a checkpoint's model from the BLAKE3 digests of its files (relative name -> hex)."""
    named = {
        name: digest
        for name, digest in digests.items()
        if "/" not in name and (name in _CHECKPOINT_FILES or name.endswith(_CHECKPOINT_SUFFIXES))
    }
    return digest_of(named)


def digest_of(digests: Mapping[str, str]) -> str:
    """Return the digest of files together from the digest of each."""
    return blake3(json.dumps(dict(digests), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_recorded(
    files: Mapping[str, Path],
    digests: Mapping[str, str],
    scheme: str,
    *,
    vocab_size: int,
    encode: Callable[[str], Sequence[int]],
) -> Reference | None:
    """Read the recording of ``scheme``, None if there is no case of it; ``encode`` gives the ids of a text.

    :class:`RecordingError` if the recording is of another checkpoint or by another script, or is damaged.
    """
    try:
        document = _load(files[RECORD])
        stale = _stale(document, digests)
        if stale:
            raise RecordingError(*stale)
        case = next((case for case in document["cases"] if case["scheme"] == scheme), None)
        if case is None:
            return None
        prompt, tokens = _text(case["prompt"]), _ids(case["tokens"], vocab_size)
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens; expected a prompt and its continuation")
        logits = _tensor(files[TENSORS], case["logits"]) if case["logits"] else None
        if logits is not None and logits.shape != (len(tokens), vocab_size):
            raise ValueError(
                f"{case['logits']} has shape {logits.shape} for {len(tokens)} tokens and a vocabulary of {vocab_size}"
            )
        continuations = [_continuation(entry, vocab_size, encode) for entry in case["continuations"]]
        versions = ", ".join(f"{name} {version}" for name, version in sorted(document.get("versions", {}).items()))
    except RecordingError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RecordingError(f"{RECORD}: damaged: {type(error).__name__}: {error}") from None
    origin = f"{RECORD}, recorded by {document['script']['name']} with {versions}"
    # By the form of the recording the first half is the prompt and the second half was decoded.
    return Reference(origin, prompt, len(tokens) // 2, tokens, logits, continuations)


def recorded_prompts(files: Mapping[str, Path]) -> tuple[str, tuple[str, ...]] | None:
    """Return the prompt and the prompts of the continuations of a recording, None if there is none to be read."""
    try:
        case = _load(files[RECORD])["cases"][0]
        return _text(case["prompt"]), tuple(_text(entry["prompt"]) for entry in case["continuations"])
    except (OSError, KeyError, TypeError, ValueError, IndexError, RecursionError):
        return None


def _load(path: Path) -> Any:
    return strict_json.read_object(path, path.name)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"a prompt must be text, found {value!r:.60}")
    return value


def _ids(value: Any, vocab_size: int) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < vocab_size for token in value):
        raise ValueError(f"ids must be a list of integers from 0 to {vocab_size - 1}, found {value!r:.60}")
    return value


def _continuation(entry: Any, vocab_size: int, encode: Callable[[str], Sequence[int]]) -> Continuation:
    prompt, text = _text(entry["prompt"]), entry["text"]
    if not isinstance(text, str):
        raise TypeError(f"the text of a continuation is {type(text).__name__}, not str")
    return Continuation(prompt, encode(prompt), _ids(entry["ids"], vocab_size), text)


def _stale(document: Any, digests: Mapping[str, str]) -> list[str]:
    script = document["script"]
    again = f"record it again with {script['name']}, or set reference to live or none"
    problems = []
    if document["checkpoint_digest"] != checkpoint_digest(digests):
        problems.append(f"{RECORD}: stale: it was recorded from other files than the checkpoint has now; {again}")
    if script["name"] in digests and digests[script["name"]] != script["digest"]:
        problems.append(f"{RECORD}: stale: {script['name']} has changed since it made the recording; {again}")
    return problems


def _tensor(path: Path, name: str) -> np.ndarray:
    info = read_header(path, path.name)[name]
    if info.dtype != "F32":
        raise ValueError(f"{path.name}: {name} is {info.dtype}, not F32")
    return np.memmap(path, "<f4", "r", info.offset, info.shape)
