"""The comparison of weights in portions, each of which another machine may compare: it is told what it needs to know of
the bundle and of the checkpoint, and reads the files that hold the values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from stages.checkpoint.tensors import Weights
from stages.runtime.tensor_cache import Record
from stages.verification import weights
from stages.verification.case import Portion

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stages.documents.files import JsonObject
    from stages.documents.params import Register
    from stages.verification.case import Case


def portions(case: Case, size: int) -> list[Portion]:
    """Split what is compared, in the order of params.json, into portions of about ``size`` bytes of the checkpoint.

    One alone for weights of awq, whose norms tell by what matrices after them were multiplied.
    """
    checkpoint, found = Weights(case.files, case.tensors), []
    for entries in checkpoint.batches(case.registry["logical"], size if case.scales != "awq" else 1 << 60):
        sources = [name for entry in entries for name in entry["sources"]]
        records = {name: case.records[name] for entry in entries for name in entry["stored"]}
        shards = {name: record.shard.relative_to(case.bundle).as_posix() for name, record in records.items()}
        what = {
            "logical": entries,
            "tensors": {name: case.tensors[name] for name in sources},
            "records": [
                [name, record.shape, record.dtype, record.encoding, shards[name], record.offset, record.nbytes]
                for name, record in records.items()
            ],
            "scales": case.scales,
        }
        files = {file for name in sources for file in checkpoint.files(name)}
        found.append(Portion(f"{sources[0]} to {sources[-1]}", what, sorted(files), sorted({*shards.values()})))
    return found


def compare(what: JsonObject, bundle: Path, files: Mapping[str, Path]) -> list[str]:
    """Return what :func:`~stages.verification.weights.differences` finds; ``files`` are those of the checkpoint."""
    records = {
        name: Record(name, tuple(shape), dtype, encoding, bundle / shard, offset, nbytes)
        for name, shape, dtype, encoding, shard, offset, nbytes in what["records"]
    }
    checkpoint = Weights(files, what["tensors"])
    return weights.differences(cast("Register", what), records, checkpoint, what["scales"])
