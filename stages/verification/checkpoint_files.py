"""Finds the files of a checkpoint as transformers reads them: a folder's own, or those made of a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.checkpoint.gguf.folder import files_of, write
from stages.tokenizers.formats import gguf_files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def checkpoint_files(root: Path, files: Mapping[str, Path], folder: Path) -> tuple[Path, Mapping[str, Path]]:
    """Return the folder and files of the checkpoint ``root``; those that GGUF files stand for go to ``folder``."""
    whole = files_of(files)
    if not whole:
        return root, files
    return folder, {**write(whole, folder), **gguf_files.write(next(iter(whole.values())), folder), **whole}
