"""A GGUF file as the folder of files in Hugging Face format that it was made of; weights stay in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.gguf import config, container, is_named
from stages.checkpoint.gguf.weights import rope_factors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def file_of(files: Mapping[str, Path]) -> str:
    """Return the name of the GGUF file that a checkpoint's ``files`` are, empty where they are another's."""
    return next((name for name in files if is_named(name)), "")


def contents_of(path: Path) -> container.Contents:
    """Return what the file says before its weights; :class:`ConfigError` if it is damaged."""
    try:
        return container.read(path, path.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def write(path: Path, folder: Path) -> dict[str, Path]:
    """Write config.json and generation_config.json of the file at ``path`` to ``folder``; return where they are."""
    contents = contents_of(path)
    documents = {
        "config.json": config.config(contents, rope_factors(path, contents)),
        "generation_config.json": config.generation(contents),
    }
    return config.written(folder, documents)
