"""Reads the files of a tokenizer, with a limit on their size, and recognises what only stands for them."""

from __future__ import annotations

from pathlib import Path

from stages.checkpoint import misplaced
from stages.checkpoint.strict_json import read_bounded
from stages.tokenizers.errors import TokenizerError

MAX_FILE_BYTES = 64 << 20  # far above any real vocabulary; the largest published ones have 20 MB
# Values of JSON, each of which takes up to 200 bytes of memory: a file of 64 MB could fill gigabytes. The largest
# published tokenizer.json, of 262,144 tokens, has 2,100,000.
MAX_VALUES = 4_000_000


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return the content; :class:`TokenizerError` for a pointer and for more than ``limit`` bytes."""
    data = read_bounded(path, limit)
    if data is None:
        raise TokenizerError(f"{path}: more than {limit:,} bytes are no file of a tokenizer")
    if instead := misplaced.pointer(data):
        raise TokenizerError(f"T02: {path}: {instead}")
    return data


def read_text(path: Path, limit: int = MAX_FILE_BYTES) -> str:
    """Return the content as text; :class:`TokenizerError` if it is not UTF-8 too."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 ({error})") from None


def read_json_text(path: Path, limit: int = MAX_FILE_BYTES) -> str:
    """Return the content as text to be parsed as JSON; :class:`TokenizerError` if that would fill the memory, too."""
    text = read_text(path, limit)
    if instead := misplaced.no_text(text.lstrip()[: misplaced.HEAD].encode()):
        raise TokenizerError(f"{path}: {instead}")
    values = text.count(",") + text.count("[") + text.count("{")
    if values > MAX_VALUES:
        raise TokenizerError(f"{path}: about {values:,} values are no vocabulary (at most {MAX_VALUES:,} are read)")
    return text
