"""Finds the changed tensors of a safetensors file for ``pipeline explain``, from digests that quantize keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from blake3 import blake3

from stages.checkpoint.safetensors import read_header

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


SHOWN = 3  # names of tensors
KIND = "digests"  # of the parts that stages.conversion.digests keeps: tensor -> digest of its bytes
Recall: TypeAlias = "Callable[[str, JsonObject], Any]"


def changed(recall: Recall, old: str, path: Path) -> str | None:
    """Describe the difference between the shard of digest ``old`` and the one at ``path``; None if not known."""
    part = recall(KIND, {"file": old})
    if part is None:
        return None
    before = json.loads(part.path.read_bytes())
    try:
        after = digests(path, set(before))
    except (OSError, ValueError):
        return None
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if not names:
        return "no tensor that was read"
    count = f"{len(names)} of {len(after)} tensors" if len(names) > 1 else "1 tensor"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{count}: {', '.join(names[:SHOWN])}{more}"


def digests(path: Path, names: set[str]) -> dict[str, str]:
    """Return the digest of each tensor of a file that is among ``names``; of the others, empty."""
    found = {}
    with path.open("rb") as file:
        for name, info in read_header(path, path.name).items():
            file.seek(info.offset)
            found[name] = blake3(file.read(info.nbytes)).hexdigest() if name in names else ""
    return found
