"""NumPy's dtypes by the names that tensor caches and schemes use, with the small floats that NumPy itself lacks."""

from __future__ import annotations

import ml_dtypes
import numpy as np

SMALL = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


def numpy_dtype(name: str) -> np.dtype:
    """Return the dtype of ``name``; :class:`TypeError` for a name nobody knows."""
    found: np.dtype = np.dtype(SMALL.get(name, name))
    return found
