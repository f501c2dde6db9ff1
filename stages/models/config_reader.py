"""Read a raw config.json strictly: every key classified, aliases of two generations, all problems collected."""

from __future__ import annotations

import difflib
import sys
from typing import TYPE_CHECKING, Any

from stages.models.record import ConfigError, KeyClass, capped
from stages.models.strict_json import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_GUESSES = 20  # keys to look for a near one of, which takes time
LARGEST = 2**31 - 1  # of a size: what kernels index with


# What transformers writes into any config.json and no inference depends on: provenance, training, output switches.
PROVENANCE = """
    _name_or_path _commit_hash auto_map transformers_version torch_dtype dtype initializer_range use_cache
    attention_dropout attn_implementation _attn_implementation return_dict output_attentions output_hidden_states
    use_return_dict torchscript tokenizer_class transformers.js_config gradient_checkpointing
"""
# What every causal language model's config.json is read for.
SHARED = """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act
    max_position_embeddings tie_word_embeddings bos_token_id eos_token_id pad_token_id
"""
NEVER = "pruned_heads add_cross_attention is_encoder_decoder tie_encoder_decoder"


def classify(honoured: str, irrelevant: str, refused: str) -> dict[str, KeyClass]:
    """Return key -> class of three lists of keys separated by white space."""
    return {
        **dict.fromkeys(honoured.split(), "honoured"),
        **dict.fromkeys(irrelevant.split(), "irrelevant"),
        **dict.fromkeys(refused.split(), "refused"),
    }


class ConfigReader:
    """Takes values out of ``raw`` and notes what is wrong; :meth:`finish` raises everything at once."""

    def __init__(self, raw: Mapping[str, Any], keys: Mapping[str, KeyClass], family: str) -> None:
        self.raw = raw
        self.problems: list[str] = []
        unknown: list[str] = []
        for key, value in raw.items():
            if key not in keys:
                near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75) if len(unknown) < MAX_GUESSES else []
                hint = f"did you mean '{near[0]}'?" if near else "its effect on the model is unknown"
                unknown.append(f"config.json: key {shown(key)} is not known for model_type '{family}'; {hint}")
            elif keys[key] == "refused" and value:
                self.problems.append(f"config.json: {key} = {shown(value)} is not supported for model_type '{family}'")
        self.problems += capped(unknown)

    def problem(self, text: str) -> None:
        """Note one more problem, a complete sentence."""
        self.problems.append(f"config.json: {text}")

    def _value(self, names: tuple[str, ...]) -> Any:
        """Return the value under any of ``names`` (synonyms), None if absent or null."""
        present = {name: self.raw[name] for name in names if self.raw.get(name) is not None}
        first = next(iter(present.values()), None)
        if any(value != first for value in present.values()):
            self.problem("contradiction: " + ", ".join(f"{k} = {shown(v)}" for k, v in present.items()))
        return first

    def integer(self, *names: str, default: int | None = None) -> int:
        """Return a positive integer under the first of ``names`` that is present, 0 after noting a problem."""
        value = self._value(names)
        if value is None and default is not None:
            return default
        if type(value) is int and 1 <= value <= LARGEST:
            return value
        found = "is missing" if value is None else f"= {shown(value)}"
        self.problem(f"{' / '.join(names)} {found}; expected a positive integer of at most {LARGEST}")
        return 0

    def number(self, *names: str, default: float) -> float:
        """Return a positive number under the first of ``names`` that is present."""
        value = self._value(names)
        if value is None:
            return default
        if type(value) in (int, float) and 0 < value <= sys.float_info.max:
            return float(value)
        self.problem(f"{' / '.join(names)} = {shown(value)}; expected a positive number")
        return default

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a boolean."""
        value = self._value((name,))
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(f"{name} = {shown(value)}; expected true or false")
            return default
        return value

    def must_be(self, name: str, wanted: Any, why: str) -> None:
        """Note a problem if ``name`` is there with another value than ``wanted``."""
        value = self._value((name,))
        same = value == wanted and isinstance(value, bool) == isinstance(wanted, bool)  # 1 == True in Python
        if value is not None and not same:
            self.problem(f"{name} = {shown(value)}; only {wanted!r} is supported: {why}")

    def finish(self) -> None:
        """Raise :class:`ConfigError` with every problem noted, if there is one."""
        if self.problems:
            raise ConfigError(*self.problems)


def trained_positions(config: Any, requested: int) -> int:
    """Return the number of positions to build for, ``config.max_positions`` for 0; ConfigError if that is fewer."""
    if requested > config.max_positions:
        raise ConfigError(
            f"context_window = {requested} exceeds max_position_embeddings = {config.max_positions} of config.json, "
            f"beyond which the model was not trained: choose context_window <= {config.max_positions}"
        )
    return requested or config.max_positions
