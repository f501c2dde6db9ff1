"""Rotary positions as config.json describes them, in both generations of its keys; what is not implemented is refused.

Old: ``rope_theta`` and ``rope_scaling``; new: all of it in ``rope_parameters``. Read as transformers 5 reads them
(``modeling_rope_utils``): what a type does not use is idle, and the top level's ``original_max_position_embeddings``
comes before that of the scaling.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypedDict, TypeVar, cast

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.strict_json import shown

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.documents.model import RopeFields, RopeParameters
    from stages.models.config_reader import ConfigReader

MAX_HEAD = 1 << 16  # channels; a frequency is computed for each pair of them before any tensor is looked at
KEYS = "rope_theta rope_scaling rope_parameters original_max_position_embeddings partial_rotary_factor"
ORIGINAL: Final = "original_max_position_embeddings"
# rope_type -> what it reads besides the base: numbers it needs, numbers it may have, lists of a number per pair
TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), (), ()),
    "linear": (("factor",), (), ()),
    "dynamic": (("factor",), (), ()),
    "yarn": (("factor", ORIGINAL), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), ()),
    "longrope": (("factor", ORIGINAL), ("attention_factor",), ("short_factor", "long_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), (), ()),
}
ABSENT_IF_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
STRETCHED = ("linear", "dynamic", "yarn", "longrope")  # types whose factor says how much longer contexts may be
Config = TypeVar("Config", bound="Rope")


class KernelOptions(TypedDict):
    """Keywords of :class:`~stages.models.family.AttentionCache`."""

    frequencies: tuple[float, ...]
    attention_factor: float


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The fields of a family's config that describe its rotary positions.

    ``rope_parameters`` are transformers' own, with what follows from other keys in place and without idle ones.
    """

    max_positions: int
    rotary_dim: int
    rope_parameters: RopeParameters

    def kernel_options(self) -> KernelOptions:
        """Return the keywords of :class:`~stages.models.family.AttentionCache`."""
        from stages.models.frequencies import frequencies

        found, factor = frequencies(self.rope_parameters, self.rotary_dim)
        return {"frequencies": found, "attention_factor": factor}

    def reference(self) -> JsonObject:
        """Return transformers' ``rope_parameters``."""
        return {**self.rope_parameters}

    @property
    def longest_context(self) -> int:
        """The positions that the model was trained for or that its scaling stretches it to."""
        kind, factor = self.rope_parameters["rope_type"], self.rope_parameters.get("factor", 1.0)
        trained = self.rope_parameters.get(ORIGINAL, self.max_positions)
        return max(self.max_positions, int(trained * factor) if kind in STRETCHED else 0)


def context_window(config: Rope, requested: int) -> int:
    """Return the number of positions to build for, ``max_positions`` for 0; ConfigError if there are fewer."""
    longest = config.longest_context
    if requested > longest:
        reason = "beyond which the model was not trained"
        if longest > config.max_positions:
            reason = f"which rope_type {config.rope_parameters['rope_type']!r} stretches to {longest}"
        raise ConfigError(
            f"context_window = {requested} exceeds max_position_embeddings = {config.max_positions} of config.json, "
            f"{reason}: choose context_window <= {longest}"
        )
    return requested or config.max_positions


def for_context(config: Config, window: int) -> tuple[Config, str]:
    """Return ``config`` with the frequencies of so many positions, where they depend on it, and what to say of that.

    transformers chooses them anew for each sequence, by its length: keys in a cache would have to be turned again.
    """
    from stages.models.frequencies import dynamic_base

    parameters, kind = config.rope_parameters, config.rope_parameters["rope_type"]
    if kind == "dynamic" and window > config.max_positions:
        base = dynamic_base(parameters, config.rotary_dim, window, config.max_positions)
        settled: RopeParameters = {"rope_type": "default", "rope_theta": base}
        ends = f"max_position_embeddings = {config.max_positions}"
    elif kind == "longrope" and window > parameters[ORIGINAL]:
        settled = {**parameters, "short_factor": parameters["long_factor"]}
        ends = f"{ORIGINAL} = {parameters[ORIGINAL]}"
    else:
        return config, ""
    return replace(config, rope_parameters=settled), (
        f"rope_type '{kind}': all sequences use the frequencies for {window} positions, the context_window; "
        f"transformers uses others for shorter sequences: if prompts and answers stay within {ends}, "
        f"set context_window to that"
    )


def read_rope(
    read: ConfigReader, head_dim: int, positions: int, *, theta_key: str = "rope_theta", share_key: str = ""
) -> RopeFields:
    """Return the fields of :class:`Rope` but for ``max_positions``, which are the ``positions``.

    ``share_key`` is the old key of the share of a head that is rotated, a quarter by default, for families that rotate
    less than a whole head.
    """
    found = [(where, _mapping(read, where)) for where in ("rope_scaling", "rope_parameters")]
    # transformers reads rope_scaling in the place of rope_parameters where both are there.
    readings = [
        _reading(read, where, values, head_dim, positions, theta_key, share_key)
        for where, values in [(where, values) for where, values in found if values] or found[1:]
    ]
    if len(readings) > 1 and readings[0] != readings[1]:
        described = [f"{where} = {shown(values)}" for where, values in found]
        read.problem(f"contradiction: {described[0]} and {described[1]} describe different positions")
    return readings[0]


def _reading(
    read: ConfigReader,
    where: str,
    values: JsonObject,
    head_dim: int,
    positions: int,
    theta_key: str,
    share_key: str,
) -> RopeFields:
    base = _one(read, where, values, theta_key, "rope_theta", 10000.0)
    partial = "partial_rotary_factor"
    share = _one(read, where, values, share_key or partial, partial, 0.25 if share_key else 1.0)
    rotary_dim = int(head_dim * share) if share_key else head_dim
    pairs = (rotary_dim + 1) // 2
    if head_dim > MAX_HEAD:
        read.problem(f"a head has {head_dim:,} channels; expected at most {MAX_HEAD:,}")
    elif not share_key and share != 1 and _kind(values) != "default":  # whose frequencies are of all channels there
        read.problem(f"partial_rotary_factor = {share}; only 1.0 is supported: all channels of a head are rotated")
    elif rotary_dim < 1 or 2 * pairs > head_dim:
        read.problem(f"{rotary_dim} of {head_dim} channels of a head are rotated; expected pairs of them")
    else:
        parameters: RopeParameters = {"rope_theta": base, **_scaling(read, where, values, pairs, positions)}
        _check(read, where, parameters, rotary_dim)
        return {"rotary_dim": rotary_dim, "rope_parameters": parameters}
    return {"rotary_dim": rotary_dim, "rope_parameters": {"rope_type": "default", "rope_theta": base}}


def _mapping(read: ConfigReader, key: str) -> JsonObject:
    value = read.raw.get(key)
    if value is None or isinstance(value, Mapping):
        return value or {}
    read.problem(f"{key} = {shown(value)}; expected an object")
    return {}


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _one(read: ConfigReader, where: str, values: JsonObject, old_key: str, new_key: str, default: float) -> float:
    """Return the one positive number under a key of config.json and another inside ``where``."""
    places = {old_key: read.raw.get(old_key), f"{where}.{new_key}": values.get(new_key)}
    found = {key: value for key, value in places.items() if value is not None}
    for key, value in found.items():
        if not _is_positive(value):
            read.problem(f"{key} = {shown(value)}; expected a positive number")
            return default
    if len({float(value) for value in found.values()}) > 1:
        read.problem("contradiction: " + ", ".join(f"{key} = {value!r}" for key, value in found.items()))
    return float(next(iter(found.values()), default))


def _kind(values: JsonObject) -> Any:
    """Return the type of a scaling, by either of its keys."""
    return next((values[key] for key in ("rope_type", "type") if values.get(key) is not None), "default")


def _scaling(read: ConfigReader, where: str, values: JsonObject, pairs: int, positions: int) -> RopeParameters:
    """Return a scaling's type and what that reads, only the type after noting a problem."""
    kind, other = _kind(values), values.get("type")
    if other is not None and other != kind:
        read.problem(f"contradiction: {where} has a type {shown(other)} and another rope_type {shown(kind)}")
    nested = [key for key, value in values.items() if isinstance(value, Mapping)]
    if nested:
        read.problem(f"{where}.{nested[0]} is an object: positions that differ from layer to layer are not implemented")
    if not isinstance(kind, str) or kind not in TYPES:
        hint = "; transformers knows it as 'longrope'" if kind == "su" else ""
        read.problem(f"{where}: rope_type {shown(kind)} is not implemented; known: {', '.join(TYPES)}{hint}")
        return {"rope_type": "default"}
    needed, optional, lists = TYPES[kind]
    found = _completed(read, kind, values, positions)
    wrong = [name for name in needed if not _is_positive(found.get(name))]
    wrong += [name for name in optional if name in found and not _is_positive(found[name])]
    for name in wrong:
        problem = f"= {shown(found[name])}" if name in found else "is missing"
        place = name if name == ORIGINAL and ORIGINAL in read.raw else f"{where}.{name}"
        read.problem(f"{place} {problem}; expected a positive number, as rope_type {kind!r} needs one")
    for name in lists:
        value = found.get(name)
        if not isinstance(value, list) or len(value) != pairs or not all(map(_is_positive, value)):
            wrong.append(name)
            read.problem(f"{where}.{name} = {shown(value)}; expected a list of {pairs} positive numbers")
    if not wrong and kind == "llama3" and found["low_freq_factor"] >= found["high_freq_factor"]:
        wrong = ["low_freq_factor"]
        read.problem(f"{where}: low_freq_factor must be below high_freq_factor")
    if wrong:
        return {"rope_type": "default"}
    more = {"truncate": bool(found["truncate"])} if kind == "yarn" and "truncate" in found else {}
    taken = {name: found[name] for name in (*needed, *optional, *lists) if name in found}
    return cast("RopeParameters", {"rope_type": kind, **taken, **more})


def _completed(read: ConfigReader, kind: str, values: JsonObject, positions: int) -> dict[str, Any]:
    """Return the values of a scaling with what transformers takes where they leave it to other keys."""
    found = {key: value for key, value in values.items() if value is not None or key in ("truncate", ORIGINAL)}
    found = {key: value for key, value in found.items() if value != 0 or key not in ABSENT_IF_ZERO}
    if ORIGINAL in read.raw:
        found[ORIGINAL] = read.raw[ORIGINAL]
    found.setdefault(ORIGINAL, positions)
    # null is the ratio of the contexts; yarn's must be there all the same.
    by_ratio = kind == "longrope" or (kind == "yarn" and "factor" in values)
    if by_ratio and "factor" not in found and _is_positive(found[ORIGINAL]):
        found["factor"] = positions / found[ORIGINAL]
    return found


def _check(read: ConfigReader, where: str, parameters: RopeParameters, rotary_dim: int) -> None:
    """Note numbers of which no frequencies can be made, such as a logarithm's base of one."""
    from stages.models.frequencies import dynamic_base, frequencies

    try:
        if parameters["rope_type"] == "dynamic":
            dynamic_base(parameters, rotary_dim, 2, 1)
        found, factor = frequencies(parameters, rotary_dim)
        possible = all(0 < number < float("inf") for number in (*found, factor))
    except (ValueError, ZeroDivisionError, OverflowError):
        possible = False
    if not possible:
        read.problem(f"{where}: no frequencies of rope_type {parameters['rope_type']!r} can be made of its numbers")
