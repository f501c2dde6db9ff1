"""Reading the files of a tokenizer: bounded, and never a Git LFS pointer taken for the file itself."""

from __future__ import annotations

from pathlib import Path

from stages.tokenizers.errors import TokenizerError

MAX_FILE_BYTES = 64 << 20  # far above any real vocabulary; the largest published ones have 20 MB
LFS_HEADER = b"version https://git-lfs"


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return the content; :class:`TokenizerError` for a pointer and for more than ``limit`` bytes."""
    size = path.stat().st_size
    if size > limit:
        raise TokenizerError(f"{path}: {size:,} bytes is no file of a tokenizer (at most {limit:,} are read)")
    data = path.read_bytes()
    if data.startswith(LFS_HEADER):
        raise TokenizerError(
            f"T02: {path}: a Git LFS pointer and not the file itself; run `git lfs pull` in the checkpoint"
        )
    return data


def read_text(path: Path) -> str:
    """Return the content as text; :class:`TokenizerError` if it is not UTF-8 too."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 ({error})") from None
