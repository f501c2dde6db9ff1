"""What ``scales: awq`` multiplies columns by, and a way to store matrices that does, for benchmarks/quality.py."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping


def factors(
    scheme: str, described: Path, listed: Path, files: Mapping[str, Path], importance: Path
) -> dict[str, np.ndarray]:
    """Return the factors by tensor, of a checkpoint's ``files`` that config-parse and calibrate have seen."""
    from stages.checkpoint.tensors import Weights
    from stages.conversion import columns
    from stages.param_register import ParamRegister
    from tests.support.local_context import run_stage

    with tempfile.TemporaryDirectory() as work, np.load(importance) as counts:
        inputs = {"config": described, "tensors": listed}
        made = run_stage(ParamRegister(), Path(work), {"scheme": scheme, "target": "llvm"}, inputs).out
        register = json.loads((made / "params.json").read_bytes())
        found = columns.factors(register, Weights(files, json.loads(listed.read_bytes())["tensors"]), dict(counts))
    entries = (entry for entry in register["logical"] if entry["name"] in found)
    return {source: found[entry["name"]] for entry in entries for source in entry["sources"]}


def way(plain: Any, *asked: Any) -> Any:
    """Return a :class:`quality.Way` that is ``plain`` but for :func:`factors`, which are searched when it is used."""
    by_tensor = functools.cache(lambda: factors(*asked))

    def left(weight: np.ndarray, of: Any) -> np.ndarray:
        factor = by_tensor().get(of.tensor)
        if factor is None:
            return plain.left(weight, of)
        counts = {of.tensor: of.found.importance[of.tensor] / factor**2}
        found: np.ndarray = plain.left(weight * factor, of._replace(found=replace(of.found, importance=counts)))
        return found / factor

    return plain._replace(left=left)
