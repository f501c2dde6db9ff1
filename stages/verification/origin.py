"""Finds the origin of a checkpoint by its folder."""

from __future__ import annotations

import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")
# What huggingface_hub writes beside each file that it downloads to a folder of one's own: commit, etag, time.
_DOWNLOADED = Path(".cache", "huggingface", "download")


def hub_origin(folder: Path) -> str:
    """Return ``ORG/NAME@COMMIT`` of a snapshot in a hub cache, ``@COMMIT`` of what was downloaded by itself, or "".

    huggingface_hub lays a cache out as ``models--ORG--NAME/snapshots/COMMIT``. ``folder`` may be a file in one.
    """
    folder, name = Path.cwd() / folder, "config.json"
    if folder.is_file():
        folder, name = folder.parent, folder.name
    repository = folder.parents[1].name if len(folder.parts) > 2 else ""
    if folder.parent.name == "snapshots" and repository.startswith("models--") and _COMMIT.fullmatch(folder.name):
        return f"{repository.removeprefix('models--').replace('--', '/', 1)}@{folder.name}"
    try:
        with (folder / _DOWNLOADED / f"{name}.metadata").open(encoding="utf-8") as file:
            commit = file.readline(64).strip()
    except (OSError, ValueError):
        return ""
    return f"@{commit}" if _COMMIT.fullmatch(commit) else ""
