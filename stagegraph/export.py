"""Copies of artifacts to ship: real files that share nothing with the store, all there or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.digest import digest_file
from stagegraph.errors import PlanError, StoreError
from stagegraph.store import fsync_file, remove_tree

if TYPE_CHECKING:
    from stagegraph.artifact import Artifact


def export(artifact: Artifact, target: Path, *, replace: bool) -> list[str]:
    """Write the files of an artifact below ``target``; :class:`PlanError` if that exists and may not be replaced."""
    target = target.absolute()
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir()) and not replace):
        raise PlanError(f"{target} exists already; name another directory" + (", or --force" * target.is_dir()))
    names = _names(artifact)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    remove_tree(partial)
    try:
        for name, stored in names.items():
            _copy(artifact, stored, partial / name)
        if target.is_dir():
            aside = target.with_name(f".{target.name}.{os.getpid()}.replaced")
            target.rename(aside)
            partial.rename(target)
            remove_tree(aside)
        else:
            partial.rename(target)
    finally:
        remove_tree(partial)
    return list(names)


def _names(artifact: Artifact) -> dict[str, str]:
    """Return name in the export -> name in the artifact."""
    path = artifact.path.rstrip("/")
    if path in artifact.files:
        return {Path(path).name: path}
    prefix = f"{path}/" if path else ""
    shipped = [name for name in artifact.files if path or not name.startswith("views/")]
    return {name.removeprefix(prefix): name for name in shipped}


def _copy(artifact: Artifact, stored: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(artifact.object(stored), target)
    target.chmod(0o644)
    fsync_file(target)
    if digest_file(target) != artifact.files[stored][0]:
        raise StoreError(f"{target}: the copy of {artifact.label}:{stored} is not what is stored; nothing was exported")
