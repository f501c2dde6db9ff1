"""The interface of a model family: its config, its parameters in packed order, its graph, its reference model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from stages.documents.files import JsonObject

# Tensors by name: arrays, or what reads one when it is asked for.
WeightValues: TypeAlias = "Mapping[str, Any]"
# The name of transformers' class, the keywords of its config, and its state dict.
ReferenceModel: TypeAlias = "tuple[str, JsonObject, WeightValues]"
Kind = Literal["linear", "embedding", "head", "router", "norm", "bias", "vector"]
Transform = str  # a row of stages.models.transforms:TRANSFORMS, with its argument after a colon where it takes one
KeyClass = Literal["honoured", "irrelevant", "refused"]


@dataclass(frozen=True)
class Param:
    """One logical parameter of the graph and where it comes from in a checkpoint.

    ``name`` is the attribute path in the graph's module, ``shape`` row-major with out features first. ``transform``
    (see :mod:`stages.models.transforms`) makes it from the checkpoint tensors ``sources`` of ``source_shapes``.
    ``dtype`` is what it is stored as where the scheme does not quantize it; empty leaves that to the scheme. ``reads``
    is the weight of the norm whose result a matrix reads, where that is read by such matrices alone.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    transform: Transform = "copy"
    dtype: Literal["", "float32"] = ""
    reads: str = ""


def copied(name: str, shape: tuple[int, ...], kind: Kind, transform: Transform = "copy", reads: str = "") -> Param:
    """Return the parameter that one checkpoint tensor of the same name and shape becomes."""
    return Param(name, shape, kind, (name,), (shape,), transform, reads=reads)


def norm_bias(weight: str) -> str:
    """Return what the bias of a norm is called, if it has one, by the name of its weight."""
    return f"{weight.removesuffix('weight')}bias"


@dataclass(frozen=True)
class AttentionCache:
    """What the paged KV cache and its kernels must know of a model's attention, which ``num_layers`` of it have.

    The first ``rotary_dim`` channels of a head are turned, the halves of that part against each other, each pair by the
    position times its own of the ``frequencies`` (radians, float32), and stretched by the ``attention_factor``.
    With ``log_n`` n > 0, where all channels are turned, the query at position p - 1 is stretched by log p / log n if
    that is more than one. With a ``sliding_window`` w > 0, all layers but the ``full_layers`` see the last w tokens
    alone. With a ``chunk`` c > 0, layers that ask with a negative scale see those tokens alone whose position divided
    by c is the query's: the runtime tells kernels nothing else of their layer. A score x of attention becomes
    ``softcap`` * tanh(x / softcap), where there is one. In the channel ``sinks`` of queries, if it is not 0, is the
    score of a sink, which takes its part of a softmax and has no value; it is 0 in keys. With ``words`` w > 0, the w
    channels from ``chosen`` on of all heads of a query, one head after the other, are words of PAGE_SIZE bits as
    integers: it sees the tokens alone at whose positions there is a 1; they are 0 in keys too. Without ``frequencies``
    nothing is turned here: the graph has done it.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    log_n: int = 0
    sliding_window: int = 0
    full_layers: tuple[int, ...] = ()
    chunk: int = 0
    softcap: float = 0.0
    sinks: int = 0
    chosen: int = 0
    words: int = 0

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are turned."""
        return 2 * len(self.frequencies)


def _itself(family: Family, config: Any) -> Family:  # noqa: ARG001
    return family


def _whatever_is_stored(config: Any, names: Collection[str]) -> Any:  # noqa: ARG001
    return config


def _whatever_the_context(config: Any, window: int) -> tuple[Any, str]:  # noqa: ARG001
    return config, ""


@dataclass(frozen=True)
class Family:
    """A model family.

    ``config`` is the family's frozen config dataclass: JSON values only, so ``config(**model["config"])`` restores
    what config-parse wrote; its property ``attention`` is the :class:`AttentionCache`. ``parse`` makes one from a raw
    config.json or raises :class:`ConfigError`. ``context_window(config, requested)`` resolves the number of positions
    to build for (0: the model's own) or raises it too; ``for_context(config, window)`` settles what depends on that and
    says it in a sentence, empty if nothing does. ``params`` lists the parameters in packed order, which is the
    attribute order of the module that ``causal_lm(config, make)`` composes from the layers of ``make``.
    ``to_reference(config, tensors)`` maps float32 checkpoint tensors by name to ``(transformers class name, config
    keywords, state dict)``. ``keys`` classifies what transformers' class reads of a config.json: honoured, irrelevant
    to inference, or refused unless it says the usual; any other key is ignored. ``recomputed`` are name patterns of
    tensors that old checkpoints store although the model derives them, beside those of rotary positions; ``tied`` names
    the output projection and the token embedding where ``config.tied`` may say that they are one; ``aliases`` are other
    names that transformers reads of a tensor. ``supports`` says in a few words each what of the family can be built.
    ``state`` is what a sequence leaves behind: a KV cache that grows with it, or the state of a recurrent model (which
    has no ``attention``), or both: ``stages.graph.OTHERS`` has the functions that build those. ``of(family, config)``
    is the record for one model, where more than its config differs from model to model. ``stored_as(config, names)`` is
    the config of a checkpoint with tensors of these names, where older ones cut the same parameters otherwise.
    """

    name: str
    architectures: tuple[str, ...]
    config: type
    parse: Callable[[JsonObject], Any]
    context_window: Callable[[Any, int], int]
    params: Callable[[Any], tuple[Param, ...]]
    causal_lm: Callable[[Any, Any], Any]
    to_reference: Callable[[Any, WeightValues], ReferenceModel]
    keys: Mapping[str, KeyClass]
    for_context: Callable[[Any, int], tuple[Any, str]] = _whatever_the_context
    recomputed: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[str, str] | None = None
    supports: tuple[str, ...] = ()
    state: Literal["kv", "rnn", "hybrid"] = "kv"
    of: Callable[[Family, Any], Family] = _itself
    stored_as: Callable[[Any, Collection[str]], Any] = _whatever_is_stored
