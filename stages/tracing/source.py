"""Builds the model of transformers for a config.json, without weights. Runs no code of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.strict_json import shown
from stages.tracing import doors, hollow
from stages.tracing.written_out import replace_written_out

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stages.documents.files import JsonObject


# Keys of configs: how many tokens attention reads, which it chooses where there are more.
CHOSEN = ("keep_window_size",)
# Settings with which what a token yields depends on where a text is divided into calls of the model.
DIVIDED = {"recurrent_kv_cache_mode": "last_loop"}


@dataclass(frozen=True)
class TracedSource:
    """``model`` of ``cls`` by ``config``, which is transformers' own reading; ``wrapper`` is the class of a model that
    has it for its text part, empty if it stands alone. ``settled`` is the context that it was made for, 0 where
    it does not depend on it: rotary frequencies may, and what attention chooses.
    """

    cls: Any
    config: Any
    model: Any
    wrapper: str
    settled: int


def open_source(raw: JsonObject, window: int) -> TracedSource:
    """Return the model that a config.json describes; :class:`ConfigError` where transformers has none that decodes."""
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    config = _config(raw)
    text = config.get_text_config(decoder=True)
    named = shown(raw["model_type"])
    if getattr(text, "is_encoder_decoder", False):
        raise ConfigError(
            f"config.json: model_type {named} is an encoder-decoder model; only decoder-only models are supported"
        )
    if getattr(text, "is_decoder", None) is False and hasattr(text, "add_cross_attention"):  # one that may be either
        raise ConfigError(
            f"config.json: model_type {named} is an encoder (is_decoder is false), whose tokens attend to later ones "
            "too; only decoders are supported"
        )
    every: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    for key, value in DIVIDED.items():
        if getattr(text, key, None) == value:
            raise ConfigError(
                f"config.json: {key} is '{value}', with which what a model says depends on how a text is divided into "
                "chunks; that is not supported"
            )
    known = next((kind for kind in (type(text), type(config)) if kind in every), None)
    if known is None:
        raise ConfigError(f"config.json: model_type {named} is no causal language model of transformers")
    cls: Any = every[known]
    text = text if isinstance(text, cls.config_class) else config
    if getattr(config, "tie_word_embeddings", False):
        text.tie_word_embeddings = True  # the head is the wrapper's, whose word on it counts
    window = window or positions_of(text)
    settled = window if settle(text, window) or getattr(text, "index_topk", None) else 0
    doors.install()
    try:
        model = _made(cls, text)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a modelling file raises of a config that it cannot use
        raise ConfigError(
            f"config.json: transformers' {cls.__name__} cannot be constructed from it: {_first(error)}"
        ) from None
    hollow.spread(model)
    replace_written_out(model, window)
    wrapper = "" if text is config else type(config).__name__.removesuffix("Config")
    return TracedSource(cls, text, model, wrapper, settled)


def _made(cls: Any, config: Any) -> Any:
    """Return the model without weights, whose attention and experts go through the doors; a class that looks its
    attention up in a table of its own is told of them afterwards.
    """
    import torch

    options = {"experts_implementation": doors.NAME, "dtype": torch.float32}
    with hollow.parameters_without_memory():
        try:
            return cls._from_config(config, attn_implementation=doors.NAME, **options).eval()
        except KeyError as error:
            if error.args != (doors.NAME,):
                raise
            model = cls._from_config(config, attn_implementation="eager", **options).eval()
            model.config._attn_implementation = doors.NAME  # noqa: SLF001 - so that no masks are made
            return model


def positions_of(config: Any) -> int:
    """Return how many positions a model can be built for, 0 if its config does not say."""
    found = [getattr(config, key, None) for key in ("max_position_embeddings", *CHOSEN)]
    return min((each for each in found if isinstance(each, int) and each > 0), default=0)


def settle(config: Any, window: int) -> bool:
    """Give a config the rotary frequencies of a context of ``window`` positions, which transformers chooses by the
    length of each sequence; say whether there was a choice.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    chosen = False
    for each in nested or [parameters]:
        kind = each.get("rope_type")
        if kind == "longrope":
            longer = window > each["original_max_position_embeddings"]
            each["short_factor"] = each["long_factor"] = each["long_factor" if longer else "short_factor"]
        elif kind == "dynamic":
            _settle_dynamic(config, each, window)
        chosen = chosen or kind in ("longrope", "dynamic")
    return chosen


def _settle_dynamic(config: Any, parameters: dict[str, Any], window: int) -> None:
    """Give the base of the NTK-aware scaling for ``window`` positions, as transformers computes it."""
    trained, factor = config.max_position_embeddings, parameters["factor"]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = int(width * parameters.get("partial_rotary_factor", 1.0))
    base = parameters["rope_theta"]
    if window > trained:
        base *= (factor * window / trained - (factor - 1)) ** (turned / (turned - 2))
    share = {name: value for name, value in parameters.items() if name == "partial_rotary_factor"}
    parameters.clear()
    parameters.update(share, rope_type="default", rope_theta=base)


def _config(raw: JsonObject) -> Any:
    import transformers

    name = raw["model_type"]
    if name not in transformers.CONFIG_MAPPING:
        own = "; the code that its auto_map names is never run" if raw.get("auto_map") else ""
        raise ConfigError(
            f"config.json: model_type {shown(name)} has no family here, and transformers {transformers.__version__} "
            f"does not know it either{_nearest(name, transformers.CONFIG_MAPPING)}{own}: if a newer transformers does, "
            "install that"
        )
    try:
        kind: Any = transformers.CONFIG_MAPPING[name]
        # Infinity and NaN, which JSON has not, are written as objects.
        return kind.from_dict(kind._decode_special_floats(dict(raw)))  # noqa: SLF001 - transformers' own reading of a file
    except Exception as error:  # noqa: BLE001 - its validators raise what they like
        raise ConfigError(f"config.json: transformers refuses it: {_first(error)}") from None


def written(values: JsonObject) -> dict[str, Any]:
    """Return the values of a config as JSON can hold them, as transformers writes them."""
    import transformers

    found: dict[str, Any] = transformers.PreTrainedConfig._encode_special_floats(values)  # noqa: SLF001 - its own writing
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    return f"; did you mean '{close[0]}'?" if close else ""


def _first(error: BaseException) -> str:
    """Return what an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__
