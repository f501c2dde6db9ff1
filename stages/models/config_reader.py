"""Read a raw config.json as transformers' own class of its model_type does, all problems collected.

What that class does not read cannot change the model: such a key is ignored. What it reads and nothing here builds is
refused unless it says the usual. An absent key has transformers' default, which null has not.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.strict_json import shown
from stages.models.family import KeyClass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stages.documents.files import JsonObject

LARGEST = 2**31 - 1  # of a size: what kernels index with
FULL, SLIDING = "full_attention", "sliding_attention"
ABSENT = object()

# What every family's config.json is read for besides the fields of its class.
SHARED = "model_type architectures bos_token_id eos_token_id pad_token_id quantization_config"
# Fields of transformers' classes that no inference depends on.
IRRELEVANT = "initializer_range use_cache attention_dropout"
# What transformers reads in the config.json of any model, and nothing here builds: its loader does, and its masks and
# caches of attention.
UNBUILT = "per_layer_config transformers_weights"
UNBUILT_ATTENTION = f"{UNBUILT} is_causal attention_chunk_size kv_sharing_modes"
USUALLY_TRUE = ("is_causal",)  # the other refused keys are usually false, null or empty


def classify(honoured: str, irrelevant: str, refused: str) -> dict[str, KeyClass]:
    """Return key -> class of three lists of keys separated by white space."""
    return {
        **dict.fromkeys(honoured.split(), "honoured"),
        **dict.fromkeys(irrelevant.split(), "irrelevant"),
        **dict.fromkeys(refused.split(), "refused"),
    }


class ConfigReader:
    """Takes values out of ``raw`` and notes what is wrong; :meth:`finish` raises everything at once.

    ``keys`` classifies what transformers' class of this ``family`` reads, ``defaults`` are what it takes for an absent
    key.
    """

    def __init__(self, raw: JsonObject, keys: Mapping[str, KeyClass], defaults: JsonObject, family: str) -> None:
        self.raw = raw
        self.defaults = defaults
        self.problems: list[str] = []
        for key, value in raw.items():
            if keys.get(key) == "refused" and bool(value) != (key in USUALLY_TRUE):
                self.problem(f"{key} = {shown(value)} is not supported for model_type '{family}'")

    def problem(self, text: str) -> None:
        """Note one more problem, a complete sentence."""
        self.problems.append(f"config.json: {text}")

    def value(self, *names: str) -> Any:
        """Return the value under any of ``names`` (synonyms), else the default of the first, :data:`ABSENT` if none."""
        present = {name: self.raw[name] for name in names if name in self.raw}
        if len(present) > 1:  # a synonym that is null says nothing
            present = {name: value for name, value in present.items() if value is not None} or present
        first = next(iter(present.values()), self.defaults.get(names[0], ABSENT))
        if any(value != first for value in present.values()):
            self.problem("contradiction: " + ", ".join(f"{k} = {shown(v)}" for k, v in present.items()))
        return first

    def wrong(self, names: str, value: Any, expected: str) -> None:
        """Note that the value of ``names`` is not what is ``expected``."""
        found = "is missing" if value is ABSENT else "is null" if value is None else f"= {shown(value)}"
        self.problem(f"{names} {found}; expected {expected}")

    def integer(self, *names: str, null: int | None = None) -> int:
        """Return a positive integer, 0 after noting a problem; ``null`` is what null, or no value, stands for."""
        value = self.value(*names)
        if null is not None and (value is None or value is ABSENT):
            return null
        if type(value) is int and 1 <= value <= LARGEST:
            return value
        self.wrong(" / ".join(names), value, f"a positive integer of at most {LARGEST}")
        return 0

    def whole(self, name: str) -> int:
        """Return an integer of either sign, at least 0."""
        value = self.value(name)
        if type(value) is int and abs(value) <= LARGEST:
            return max(value, 0)
        self.wrong(name, value, "a whole number")
        return 0

    def number(self, *names: str) -> float:
        """Return a positive number, 1 after noting a problem."""
        value = self.value(*names)
        if type(value) in (int, float) and 0 < value <= sys.float_info.max:
            return float(value)
        self.wrong(" / ".join(names), value, "a positive number")
        return 1.0

    def flag(self, name: str) -> bool:
        """Return a boolean, false after noting a problem."""
        value = self.value(name)
        if not isinstance(value, bool):
            self.wrong(name, value, "true or false")
            return False
        return value

    def activation(self, known: Mapping[str, str]) -> str:
        """Return what ``known`` says of hidden_act."""
        value = self.value("hidden_act")
        if isinstance(value, str) and value in known:
            return known[value]
        self.wrong("hidden_act", value, f"one of those that are implemented: {', '.join(known)}")
        return next(iter(known))

    def layer_kinds(self, layers: int) -> list[str] | None:
        """Return layer_types, full or sliding; None where config.json does not say, or after noting a problem."""
        kinds = self.raw.get("layer_types")
        if kinds is None:
            return None
        if isinstance(kinds, list) and len(kinds) == layers:
            kinds = [FULL if kind == "attention" else kind for kind in kinds]  # transformers' former name
            if all(kind in (FULL, SLIDING) for kind in kinds):
                return kinds
        self.wrong("layer_types", kinds, f"{FULL} or {SLIDING} for each of {layers} layers")
        return None

    def no_window(self, layers: int, positions: int) -> None:
        """Note what makes transformers' cache forget although the model of this family attends to everything."""
        window = self.raw.get("sliding_window")
        if SLIDING in (self.layer_kinds(layers) or []):
            self.problem(f"layer_types has {SLIDING}, which is not supported for this model_type")
        elif window is not None and not (type(window) is int and window >= positions > 0):
            self.wrong("sliding_window", window, "null: the layers of this model_type attend to all positions")

    def must_be(self, name: str, wanted: Any, why: str) -> None:
        """Note a problem if ``name`` is there with another value than ``wanted``."""
        value = self.raw.get(name)
        same = value == wanted and isinstance(value, bool) == isinstance(wanted, bool)  # 1 == True in Python
        if value is not None and not same:
            self.problem(f"{name} = {shown(value)}; only {wanted!r} is supported: {why}")

    def finish(self) -> None:
        """Raise :class:`ConfigError` with every problem noted, if there is one."""
        if self.problems:
            raise ConfigError(*self.problems)
