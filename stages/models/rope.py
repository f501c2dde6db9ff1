"""Rotary positions as config.json describes them, in both generations of its keys; what is not implemented is refused.

Old: ``rope_theta`` and ``rope_scaling``; new: all of it in ``rope_parameters``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.models.config_reader import ConfigReader

KEYS = "rope_theta rope_scaling rope_parameters"
# rope_type -> the numbers it needs besides the base
TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The fields of a family's config that describe its rotary positions; numbers a type has no use for are zero."""

    rope_theta: float
    rotary_dim: int
    rope_type: str = "default"
    rope_factor: float = 0.0
    rope_low_freq_factor: float = 0.0
    rope_high_freq_factor: float = 0.0
    rope_original_positions: int = 0

    def kernel_options(self) -> dict[str, Any]:
        """Return the keywords of :class:`~stages.models.record.AttentionCache`."""
        options: dict[str, Any] = {"rotary_dim": self.rotary_dim, "rope_theta": self.rope_theta}
        if self.rope_type == "linear":
            options["rope_scale"] = 1 / self.rope_factor
        elif self.rope_type == "llama3":
            options["rope_scaling"] = self._scaling()
        return options

    def reference(self) -> dict[str, Any]:
        """Return transformers' ``rope_parameters``."""
        return {"rope_theta": self.rope_theta, **self._scaling()}

    def _scaling(self) -> dict[str, Any]:
        values = {
            "factor": self.rope_factor,
            "low_freq_factor": self.rope_low_freq_factor,
            "high_freq_factor": self.rope_high_freq_factor,
            "original_max_position_embeddings": self.rope_original_positions,
        }
        return {"rope_type": self.rope_type, **{name: values[name] for name in TYPES[self.rope_type]}}


def read_rope(
    read: ConfigReader,
    head_dim: int,
    *,
    theta_keys: tuple[str, ...] = ("rope_theta",),
    share_keys: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the fields of :class:`Rope`; ``share_keys`` are old keys of the share of a head that is rotated, a quarter
    by default, for families that rotate less than a whole head.
    """
    old, new = _mapping(read, "rope_scaling"), _mapping(read, "rope_parameters")
    theta = {key: read.raw[key] for key in theta_keys if read.raw.get(key) is not None}
    share = {key: read.raw[key] for key in share_keys if read.raw.get(key) is not None}
    scaling: dict[str, Any] = {}
    for where, found in (("rope_scaling", old), ("rope_parameters", new)):
        values = dict(found)
        if "rope_theta" in values:
            theta[f"{where}.rope_theta"] = values.pop("rope_theta")
        if share_keys and "partial_rotary_factor" in values:
            share[f"{where}.partial_rotary_factor"] = values.pop("partial_rotary_factor")
        if values.get("partial_rotary_factor") == 1.0:
            del values["partial_rotary_factor"]
        scaling = _scaling(read, where, values) or scaling
    if old and new and _scaling(read, "rope_scaling", old) != _scaling(read, "rope_parameters", new):
        read.problem("contradiction: rope_scaling and rope_parameters describe different positions")
    base, part = _one(read, theta, 10000.0), _one(read, share, 0.25 if share_keys else 1.0)
    rotary_dim = int(head_dim * part)
    if part > 1 or rotary_dim < 2 or rotary_dim % 2:
        read.problem(f"{rotary_dim} of {head_dim} channels of a head are rotated; expected an even number of them")
    return {"rope_theta": base, "rotary_dim": rotary_dim, **scaling}


def _mapping(read: ConfigReader, key: str) -> Mapping[str, Any]:
    value = read.raw.get(key)
    if value is None or isinstance(value, Mapping):
        return value or {}
    read.problem(f"{key} = {value!r}; expected an object")
    return {}


def _one(read: ConfigReader, found: Mapping[str, Any], default: float) -> float:
    """Return the one positive number under several keys."""
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            read.problem(f"{key} = {value!r}; expected a positive number")
            return default
    if len({float(value) for value in found.values()}) > 1:
        read.problem("contradiction: " + ", ".join(f"{key} = {value!r}" for key, value in found.items()))
    return float(next(iter(found.values()), default))


def _scaling(read: ConfigReader, where: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a scaling, {} for none."""
    values = {key: value for key, value in found.items() if value is not None}
    kind = values.pop("rope_type", values.get("type", "default"))
    if values.pop("type", kind) != kind:
        read.problem(f"contradiction: {where} has a type and another rope_type")
    if not isinstance(kind, str) or kind not in TYPES:
        read.problem(f"{where}: rope_type {kind!r} is not implemented; known: {', '.join(TYPES)}")
        return {}
    numbers = {}
    for name in TYPES[kind]:
        value = values.pop(name, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            read.problem(f"{where}.{name} = {value!r}; expected a positive number, as rope_type {kind!r} needs one")
            return {}
        numbers[name] = value
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        read.problem(f"{where}: low_freq_factor must be below high_freq_factor")
    if values:
        read.problem(f"{where}: {', '.join(sorted(values))} is not known for rope_type {kind!r}")
    if kind == "default":
        return {}
    return {
        "rope_type": kind,
        "rope_factor": float(numbers["factor"]),
        "rope_low_freq_factor": float(numbers.get("low_freq_factor", 0.0)),
        "rope_high_freq_factor": float(numbers.get("high_freq_factor", 0.0)),
        "rope_original_positions": int(numbers.get("original_max_position_embeddings", 0)),
    }
