"""Finer steps for columns that carry much (AWQ): a matrix is multiplied by factors, the norm before it divided by them.

What the two compute together stays the same; what a group's step rounds away of a multiplied column is divided too. The
factors of a norm are chosen for all matrices that read it, and these alone: powers of what each column carries, of
which the one of least weighted error is taken (Lin et al. 2023, without clipping).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stages.checkpoint.tensors import as_dtype
from stages.models.family import norm_bias
from stages.problems import ProblemsError
from stages.quantization.calibrated import KEPT_ANYWAY
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.parameter import quantize, restored
from stages.quantization.rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stages.checkpoint.tensors import Weights
    from stages.documents.params import Parameter, Register

POWERS = 10  # that are tried, from 0 on
SAMPLED = 256  # rows of all matrices that read a norm: so many tell which power is best
LEAST = 2.0**-12  # of a norm's value once it is divided: smaller ones lose digits in float16
TRANSFORMS = ("copy", "concat0", "interleaved_qkv")  # whose columns are those of the tensors


class NothingFoldsError(ProblemsError):
    """No matrix has a norm before it that factors may go into."""


def factors(register: Register, weights: Weights, importance: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return by parameter, norms among them, the float32 [k] that its columns are multiplied by.

    Matrices of eight bits, and what reads no norm alone, have none; nor has what plain rounding suits best.
    :class:`NothingFoldsError` if the family says of no matrix which norm it reads.
    """
    found: dict[str, np.ndarray] = {}
    groups, names = [*_groups(register)], {entry["name"] for entry in register["logical"]}
    if not groups:
        raise NothingFoldsError(
            f"scales: awq divides norms, and of no matrix of the family {register['family']} it is known that it alone "
            "reads one: use scales: importance or gptq"
        )
    for norm, readers in groups:
        counts = [importance.get(name) for entry in readers for name in entry["sources"]]
        known = [each for each in counts if each is not None and each.shape == (readers[0]["shape"][-1],)]
        rows = [entry["quantize"] for entry in readers]
        if len(known) < len(counts) or any(row is None or row["bits"] >= KEPT_ANYWAY for row in rows):
            continue
        carried: np.ndarray = np.stack(known).mean(axis=0, dtype=np.float32)
        chosen = searched([*_sampled(readers, weights)], carried)
        if chosen is not None:
            own = as_dtype(weights[norm["sources"][0]], np.dtype(np.float32))
            with np.errstate(over="ignore"):  # of float16: not divided then
                factor = effective(own, chosen, norm["dtype"])
            divided = [norm["name"], *(name for name in (norm_bias(norm["name"]),) if name in names)]
            found |= {entry["name"]: factor for entry in readers} | dict.fromkeys(divided, 1 / factor)
    return found


def searched(matrices: Sequence[tuple[np.ndarray, Row]], carried: np.ndarray) -> np.ndarray | None:
    """Return the factors float32 [k] with which ``matrices`` (float32 [n, k] and how they are stored) lose least where
    an error of column i counts by ``carried`` [k]; None if none are better than ones.
    """
    least, best = np.inf, None
    for number in range(POWERS if carried.max(initial=0) > 0 else 1):
        factor = np.maximum(carried, carried.max() * np.float32(1e-8)) ** np.float32(number / POWERS / 2)
        factor = (factor / np.sqrt(factor.max() * factor.min())).astype(np.float32)
        error = 0.0
        for weight, row in matrices:
            packed = quantize(weight * factor, row, "importance", carried / factor**2)
            left = restored(packed, row, len(factor)) / factor
            error += float(np.square(left - weight).sum(axis=0, dtype=np.float64) @ carried)
        if error < least:
            least, best = error, factor if number else None
    return best


def effective(norm: np.ndarray, factor: np.ndarray, dtype: str) -> np.ndarray:
    """Return the factors float32 [k] that are exact for ``norm`` float32 [k] as it is stored once it is divided by
    ``factor``: what its rounding to ``dtype`` is off by is in them. Where it would lose digits it is not divided.
    """
    plain, divided = (each.astype(numpy_dtype(dtype)).astype(np.float32) for each in (norm, norm / factor))
    stored = np.where(np.isfinite(divided) & (np.abs(divided) > LEAST), divided, plain)
    usable = np.isfinite(stored) & (stored != 0)
    exact: np.ndarray = np.where(usable, norm / np.where(usable, stored, 1), 1).astype(np.float32)
    return exact


def _groups(register: Register) -> Iterator[tuple[Parameter, list[Parameter]]]:
    """Yield each norm and the matrices that read it and share factors."""
    by_name = {entry["name"]: entry for entry in register["logical"]}
    readers: dict[str, list[Parameter]] = {}
    for entry in register["logical"]:
        if "reads" in entry:
            readers.setdefault(entry["reads"], []).append(entry)
    for name, entries in readers.items():
        norm = by_name[name]
        if norm["transform"] == "copy" and all(entry["transform"].split(":")[0] in TRANSFORMS for entry in entries):
            yield norm, entries


def _sampled(readers: Sequence[Parameter], weights: Weights) -> Iterator[tuple[np.ndarray, Row]]:
    """Yield some rows of each tensor, and how they are stored."""
    step = max(1, sum(entry["shape"][0] for entry in readers) // SAMPLED)
    for entry in readers:
        assert entry["quantize"]
        for name in entry["sources"]:
            yield as_dtype(weights[name][::step], np.dtype(np.float32)), Row(**entry["quantize"])
