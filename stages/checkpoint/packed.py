"""The table of packed forms (GPTQ, AWQ, nf4, GGUF and others): how tensors of each are dequantized."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from stages.checkpoint.stored import StoredParts
    from stages.documents.model import Packed

# Form -> the function (parts, settings, start, stop) that returns those rows of the tensor.
FORMS: dict[str, str] = {
    "ggml": "stages.checkpoint.gguf.weights:rows",
    "gptq": "stages.checkpoint.dequantization:gptq",
    "awq": "stages.checkpoint.dequantization:awq",
    "compressed-tensors": "stages.checkpoint.dequantization:packed",
    "scaled": "stages.checkpoint.dequantization:scaled",
    "int8": "stages.checkpoint.dequantization:int8",
    "mxfp4": "stages.checkpoint.dequantization:mxfp4",
    "nf4": "stages.checkpoint.dequantization:nf4",
}


def rows(packed: Packed, parts: StoredParts, start: int, stop: int) -> np.ndarray:
    """Return the rows ``start`` to ``stop`` of a tensor, in the dtype that its entry names."""
    module, _, name = FORMS[packed["form"]].partition(":")
    made: np.ndarray = getattr(importlib.import_module(module), name)(parts, packed["settings"], start, stop)
    return made
