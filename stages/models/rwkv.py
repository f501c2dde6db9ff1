"""RWKV-4 (``model_type: rwkv``): a recurrent model; a state of five vectors per layer in place of a KV cache.

Parameters keep the names and the values of the checkpoint: ``time_decay`` becomes -exp(time_decay) in the graph.
``rescale_every`` = n, transformers' guard against float16's range, halves the residual stream after every n-th layer
and scales what is added to it alike. A norm sees the scale of its input through its epsilon alone: so the graph does
not halve, keeps the residual stream in float32, and multiplies each epsilon by 4 ** (times halved), which is equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.models.config_reader import IRRELEVANT, SHARED, UNBUILT, ConfigReader, classify
from stages.models.family import Family, Param, copied

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.models.family import ReferenceModel, WeightValues

FINAL_EPS = 1e-5  # of the last norm: transformers takes no notice of layer_norm_epsilon there


@dataclass(frozen=True)
class RwkvConfig:
    """Sizes and options that determine the graph; ``rescale_every`` is 0 for never."""

    vocab_size: int
    hidden_size: int
    attention_hidden_size: int
    intermediate_size: int
    num_layers: int
    norm_eps: float
    rescale_every: int
    context_length: int


# Of transformers' RwkvConfig, which takes max_position_embeddings for context_length.
DEFAULTS = {
    "vocab_size": 50277,
    "hidden_size": 4096,
    "attention_hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "rescale_every": 6,
    "context_length": 1024,
    "tie_word_embeddings": False,
}
KEYS = classify(f"{SHARED} {' '.join(DEFAULTS)} max_position_embeddings", IRRELEVANT, UNBUILT)


def parse(raw: JsonObject) -> RwkvConfig:
    """Return the config of a raw config.json; :class:`~stages.models.family.ConfigError` lists all that is wrong."""
    read = ConfigReader(raw, KEYS, DEFAULTS, "rwkv")
    hidden = read.integer("hidden_size")
    if read.flag("tie_word_embeddings"):
        read.problem(
            "tie_word_embeddings = true is not supported for model_type 'rwkv', whose head is a tensor of its own"
        )
    config = RwkvConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        attention_hidden_size=read.integer("attention_hidden_size", null=hidden),
        intermediate_size=read.integer("intermediate_size", null=4 * hidden),
        num_layers=read.integer("num_hidden_layers"),
        norm_eps=read.number("layer_norm_epsilon"),
        rescale_every=read.whole("rescale_every"),
        context_length=read.integer("context_length", "max_position_embeddings"),
    )
    read.finish()
    return config


def context_window(config: RwkvConfig, requested: int) -> int:
    """Return ``requested``, for 0 the length that the model was trained on: a state has no limit of its own."""
    return requested or config.context_length


def params(config: RwkvConfig) -> tuple[Param, ...]:
    """Return the parameters in packed order under the checkpoint's names; all that is no matrix stays float32."""
    h, a, ff, rows = config.hidden_size, config.attention_hidden_size, config.intermediate_size, config.vocab_size
    found = [copied("rwkv.embeddings.weight", (rows, h), "embedding"), *_norm("rwkv.blocks.0.pre_ln", h)]
    for i in range(config.num_layers):
        block = f"rwkv.blocks.{i}"
        time, channel = f"{block}.attention", f"{block}.feed_forward"
        found += [
            *_norm(f"{block}.ln1", h),
            *(_vector(f"{time}.{name}", (a,)) for name in ("time_decay", "time_first")),
            *(_vector(f"{time}.time_mix_{name}", (1, 1, h)) for name in ("key", "value", "receptance")),
            *(copied(f"{time}.{name}.weight", (a, h), "linear") for name in ("key", "value", "receptance")),
            copied(f"{time}.output.weight", (h, a), "linear"),
            *_norm(f"{block}.ln2", h),
            *(_vector(f"{channel}.time_mix_{name}", (1, 1, h)) for name in ("key", "receptance")),
            copied(f"{channel}.key.weight", (ff, h), "linear"),
            copied(f"{channel}.receptance.weight", (h, h), "linear"),
            copied(f"{channel}.value.weight", (h, ff), "linear"),
        ]
    return (*found, *_norm("rwkv.ln_out", h), copied("head.weight", (rows, h), "head"))


def _vector(name: str, shape: tuple[int, ...], kind: Any = "vector") -> Param:
    return Param(name, shape, kind, (name,), (shape,), dtype="float32")


def _norm(name: str, width: int) -> tuple[Param, Param]:
    return _vector(f"{name}.weight", (width,), "norm"), _vector(f"{name}.bias", (width,), "bias")


def causal_lm(config: RwkvConfig, make: Any) -> Any:
    """Return the graph's module composed of the layers of ``make``; its attribute order is that of :func:`params`."""
    from stages.models import rwkv_layers

    h, a = config.hidden_size, config.attention_hidden_size

    def block(i: int) -> rwkv_layers.Block:
        name, eps = f"rwkv.blocks.{i}", config.norm_eps * 4 ** _halvings(config, i)
        return rwkv_layers.Block(
            rwkv_layers.Float32LayerNorm(make, f"{name}.ln1", h, eps),
            rwkv_layers.TimeMixing(make, f"{name}.attention", h, a),
            rwkv_layers.Float32LayerNorm(make, f"{name}.ln2", h, eps),
            rwkv_layers.ChannelMixing(make, f"{name}.feed_forward", h, config.intermediate_size),
        )

    return rwkv_layers.RecurrentLM(
        make,
        make.embedding("rwkv.embeddings", config.vocab_size, h),
        rwkv_layers.Float32LayerNorm(make, "rwkv.blocks.0.pre_ln", h, config.norm_eps),
        [block(i) for i in range(config.num_layers)],
        rwkv_layers.Float32LayerNorm(make, "rwkv.ln_out", h, FINAL_EPS * 4 ** _halvings(config, config.num_layers)),
        make.head("head", config.vocab_size, h),
        width=h,
        attention_width=a,
    )


def _halvings(config: RwkvConfig, layer: int) -> int:
    """Return how often transformers has halved the residual stream that enters ``layer``."""
    return layer // config.rescale_every if config.rescale_every else 0


def to_reference(config: RwkvConfig, tensors: WeightValues) -> ReferenceModel:
    """Return transformers' model: class name, config keywords, state dict (``tensors``, whose names are its own)."""
    keywords = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "attention_hidden_size": config.attention_hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "layer_norm_epsilon": config.norm_eps,
        "rescale_every": config.rescale_every,
        "context_length": config.context_length,
        "tie_word_embeddings": False,
    }
    return "RwkvForCausalLM", keywords, dict(tensors)


FAMILY = Family(
    name="rwkv",
    architectures=("RwkvForCausalLM",),
    config=RwkvConfig,
    parse=parse,
    context_window=context_window,
    params=params,
    causal_lm=causal_lm,
    to_reference=to_reference,
    keys=KEYS,
    supports=(
        "RWKV-4: a recurrent state of five tensors a layer, texts of any length",
        "rescale_every, folded exactly",
    ),
    state="rnn",
)
