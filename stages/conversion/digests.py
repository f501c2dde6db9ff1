"""Digests of checkpoint tensors, each taken once: those of a file are remembered under the file's own digest.

The values of a packed tensor follow from more than its file: from what config.json says of the format, and from files
that hold its other parts. What config-parse made of these is in the document too.
"""

from __future__ import annotations

import json
from collections import deque
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from stages.checkpoint.tensors import Weights
    from stages.documents.files import JsonObject
    from stages.documents.model import CheckpointTensor, Packed
    from stages.memo import Memo

KIND = "digests"


class Digests:
    """Content digests by tensor name; safe to ask from several threads. ``files`` are the shards' own digests.

    ``names`` are all that will be asked for: when the last one of a file is known, the file's are kept. ``known`` are
    digests that were taken elsewhere.
    """

    def __init__(
        self,
        memo: Memo,
        weights: Weights,
        tensors: Mapping[str, CheckpointTensor],
        names: Iterable[str],
        files: Mapping[str, str],
        scratch: Path,
        known: Mapping[str, str],
    ) -> None:
        self._memo = memo
        self._weights = weights
        self._tensors = tensors
        self._files = files
        self._scratch = scratch
        self._lock = Lock()
        self._known = dict(known)
        self._packed: dict[str, dict[str, Packed]] = {}  # file -> its packed tensors
        for name, entry in tensors.items():
            if "packed" in entry:
                self._packed.setdefault(entry["file"], {})[name] = entry["packed"]
        self._waiting: dict[str, set[str]] = {}  # file -> its tensors that are not known yet
        for name in names:
            self._waiting.setdefault(tensors[name]["file"], set()).add(name)
        for file, wanted in self._waiting.items():
            document = self._document(file)
            part = memo.recall(KIND, document) if document else None
            if part is not None:
                found = json.loads(part.path.read_bytes())
                self._known |= found
                wanted.difference_update(found)
            wanted.difference_update(known)

    def __contains__(self, name: str) -> bool:
        """Say whether a tensor's digest is known."""
        return name in self._known

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor's blocks (:meth:`.Weights.blocks`); after the last one its digest is known."""
        if name in self._known:
            yield from self._weights.blocks(name)
            return
        digest = blake3()
        for block in self._weights.blocks(name):
            digest.update(block.reshape(-1).view(np.uint8).data)
            yield block
        with self._lock:
            self._known[name] = digest.hexdigest()
            self._complete(name, self._tensors[name]["file"])

    def tensor(self, name: str) -> np.ndarray:
        """Return a whole tensor, whose digest is known then."""
        self.take([name])
        return self._weights[name]

    def take(self, names: Iterable[str]) -> list[str]:
        """Return the tensors' digests; reads those that are not known."""
        for name in names:
            if name not in self._known:
                deque(self.blocks(name), maxlen=0)
        return [self._known[name] for name in names]

    def _complete(self, name: str, file: str) -> None:
        """Note that ``name`` is known; with the last one of its file, keep the file's."""
        waiting = self._waiting[file]
        waiting.discard(name)
        document = None if waiting else self._document(file)
        if document is None:
            return
        self._weights.check_unchanged(name)
        known = {name: digest for name, digest in self._known.items() if self._tensors[name]["file"] == file}
        path = self._scratch / "digests.json"
        path.write_text(json.dumps(known, sort_keys=True), encoding="utf-8")
        self._memo.remember(KIND, document, path)
        path.unlink()

    def _document(self, file: str) -> JsonObject | None:
        """Return all that the values of a file's tensors depend on beside code; None where not all files are here."""
        packed = self._packed.get(file, {})
        read = {file, *(part["file"] for each in packed.values() for part in each["parts"].values())}
        if not read <= self._files.keys():
            return None
        others = {name: self._files[name] for name in sorted(read - {file})}
        return {"file": self._files[file], **({"packed": packed, "others": others} if packed else {})}
