"""Recognises weights that other tools quantized, and adapters, by their tensors alone.

Named by what each tool writes: AutoGPTQ, AutoAWQ, bitsandbytes, compressed-tensors, ModelOpt, MLX and the rest.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stages.checkpoint.safetensors import TensorInfo

# What the last parts of a tensor's name say; the first row of which all are there is the form.
FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("GPTQ", ("qweight", "g_idx")),
    ("AWQ", ("qweight", "qzeros")),
    ("GPTQ or one of its kind", ("qweight",)),
    ("compressed-tensors", ("weight_packed",)),
    ("bitsandbytes with 4 bits", ("weight.absmax",)),
    ("bitsandbytes with int8", ("SCB",)),
    ("NVFP4", ("weight_scale_2",)),
    ("fp8 with a scale for each block", ("weight_scale_inv",)),
    ("fp8 or int8 with scales", ("weight_scale",)),
    ("MLX", ("scales",)),
    ("HQQ", ("W_q",)),
    ("quanto", ("weight._data",)),
    ("AQLM", ("codes", "codebooks")),
)
ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "modules_to_save")
DTYPES = {
    "I8": "int8",
    "U8": "packed bytes",
    "I32": "packed integers",
    "U32": "packed integers",
    "F4": "fp4",
}
PLAIN = {"F8_E4M3": "fp8", "F8_E5M2": "fp8"}  # numbers as they are, unless config.json names a method that scales them
SHARE = 4  # one tensor in so many makes a dtype the form of the weights


def form(tensors: Mapping[str, tuple[str, TensorInfo]], declared: bool) -> str:
    """Say by which method the weights of a checkpoint are packed, and by which tensors that shows; empty if none.

    ``declared`` says that config.json names a method.
    """
    dtypes = DTYPES | (PLAIN if declared else {})
    ends: dict[str, list[str]] = defaultdict(list)
    for name in sorted(tensors):
        parts = name.split(".")
        ends[parts[-1]].append(name)
        ends[".".join(parts[-2:])].append(name)
    for method, marks in FORMS:
        if all(mark in ends for mark in marks):
            return _shown(method, ends[marks[0]])
    by_dtype: dict[str, list[str]] = defaultdict(list)
    for name in ends["weight"]:
        by_dtype[tensors[name][1].dtype].append(name)
    for dtype, names in by_dtype.items():
        if dtype in dtypes and len(names) * SHARE >= len(ends["weight"]):
            return _shown(f"a method that stores {dtypes[dtype]}", names)
    return ""


def adapter(names: Iterable[str]) -> str:
    """Return a tensor that adapts another one, empty if there is none."""
    return next((name for name in names if any(part in ADAPTERS for part in name.split("."))), "")


def _shown(method: str, names: Sequence[str]) -> str:
    return f"{method} ({len(names):,} tensors such as {names[0][:200]})"
