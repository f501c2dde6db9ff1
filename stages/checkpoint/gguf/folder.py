"""GGUF files, those of one model, as the files in Hugging Face format that they were made of; weights stay in them."""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.gguf import config, container, is_named
from stages.checkpoint.gguf.weights import rope_factors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def file_of(files: Mapping[str, Path]) -> str:
    """Return the name of the GGUF file that a checkpoint's ``files`` are, the first one's of several; empty where they
    are another's.
    """
    return next(iter(files_of(files)), "")


def files_of(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the GGUF files among ``files``, in order."""
    return {name: files[name] for name in sorted(files) if is_named(name)}


def beside(path: Path) -> dict[str, Path]:
    """Return a GGUF file by its name and, if it is the first that a model was split into, the others that are there."""
    pattern = glob.escape(path.name).replace("-00001-of-", "-?????-of-")
    return {found.name: found for found in sorted(path.parent.glob(pattern))}


def contents_of(files: Mapping[str, Path]) -> container.Contents:
    """Return the metadata and tensor table of the files; :class:`ConfigError` if they are damaged."""
    try:
        return container.read_all(files)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def write(files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Write config.json and generation_config.json of GGUF ``files`` to ``folder``; return where they are."""
    contents = contents_of(files)
    documents = {
        "config.json": config.config(contents, rope_factors(files, contents)),
        "generation_config.json": config.generation(contents),
    }
    return config.written(folder, documents)
