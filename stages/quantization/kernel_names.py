"""Names of the quantizing kernels, and the sizes that they and their callers agree on.

A kernel's name says what it does: ``quantize_bfloat16_float16_4_32_max_n32``, ``cast_bfloat16_float16``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.quantization.rows import Row

ROW = 4096  # values of one row of a cast
WORDS_AT_ONCE = {3: 8, 4: 32, 8: 8}  # bits -> the least values of a group that are packed at once
TILE_ROWS, TILE_GROUPS = 32, 64  # what is quantized before the next rows and groups are


def quantize_name(source: str, row: Row, scales: str, layout: str) -> str:
    """Return the name of the kernel that quantizes values of dtype ``source`` into ``layout``."""
    return f"quantize_{source}_{row.scale_dtype}_{row.bits}_{row.group_size}_{scales}_{layout}"


def compiled(row: Row, scales: str) -> bool:
    """Say whether there is a kernel that quantizes so; NumPy does the rest."""
    plain = row.kind == "group" and not row.minimum and row.bits in WORDS_AT_ONCE
    return plain and row.group_size >= WORDS_AT_ONCE[row.bits] and scales in ("max", "mse")


def cast_name(source: str, stored: str) -> str:
    """Return the name of the kernel that casts ``source`` to ``stored``."""
    return f"cast_{source}_{stored}"


def parse_name(name: str) -> tuple[str, tuple[Any, ...]]:
    """Return a kernel's algorithm and its arguments."""
    algorithm, *words = name.split("_")
    return algorithm, tuple(int(word) if word.isdigit() else word for word in words)
