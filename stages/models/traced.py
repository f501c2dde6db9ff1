"""The family of all models without a module here: transformers' code is traced when config.json is read.

What was traced is data (:mod:`stages.tracing`), so that nothing behind config-parse needs torch.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.checkpoint.errors import ConfigError
from stages.models.family import AttentionCache, Family, Param
from stages.models.naming import suffixes, unwrapped
from stages.sizes import words_of

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.models.family import ReferenceModel, WeightValues

# Operators of layers that keep a state of each sequence.
KEEPING = ("causal_conv", "ssm_scan", "selective_scan", "linear_scan", "delta_rule", "choose")
LANES = 16  # channels of a head come in multiples of so many, where kernels are ours


@dataclass(frozen=True, kw_only=True)
class TracedConfig:
    """A traced model, as JSON values.

    ``hidden_size`` is the width of embeddings, with what tables of layers say of a token behind them. ``source`` is
    what transformers' config of ``model_type`` says, ``architecture`` its class; ``wrapper`` is the name of a model
    that has it for its text part. ``parts`` are the graphs of embed, body and head, written in the operators of
    :mod:`stages.models.operators` on ``parameters`` and ``constants``. ``tie`` names the output projection and the
    embedding, which are one where it is ``tied``; ``embedding`` is that of the tokens; ``unread`` are names of the
    state dict that nothing reads; ``older`` are those that a checkpoint of an earlier transformers may have otherwise
    (:func:`stages.tracing.older.forms`). ``frequencies`` and ``attention_factor`` are what the cache turns heads by, as
    in :class:`~stages.models.family.AttentionCache`. ``settled`` is the context that it was traced for, 0 if
    it does not depend on it; then ``unsettled`` is config.json as it was read.
    """

    model_type: str
    architecture: str
    wrapper: str
    source: JsonObject
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    frequencies: Sequence[float]
    attention_factor: float
    settled: int
    unsettled: JsonObject
    tied: bool
    tie: Sequence[str] | None
    embedding: str
    parts: JsonObject
    parameters: Sequence[JsonObject]
    constants: Sequence[JsonObject]
    unread: Sequence[str]
    older: Mapping[str, JsonObject]

    @property
    def mixture(self) -> bool:
        """Whether layers of experts are chosen for each token."""
        return any(name == "expert_linear" for name, _ in self.parts["body"]["nodes"])

    @property
    def remembers(self) -> bool:
        """Whether layers keep a state beside the KV cache."""
        return any(name in KEEPING for name, _ in self.parts["body"]["nodes"])

    @property
    def attention(self) -> AttentionCache | None:
        """What the KV cache must know, None for a model without; what it does not turn, the graph does."""
        layers = [arguments for name, arguments in self.parts["body"]["nodes"] if name == "attention"]
        if not layers:
            return None
        windows = [layer["window"] for layer in layers]
        width = max(max(layer["width"], layer["value_width"]) for layer in layers)
        sinks = width if any("sinks" in layer for layer in layers) else 0
        chosen = width + (sinks > 0)
        contexts = [node["context"] for name, node in self.parts["body"]["nodes"] if name == "choose"]
        words = -(-words_of(contexts[0]) // layers[0]["heads"]) if contexts else 0
        return AttentionCache(
            len(layers),
            layers[0]["heads"],
            math.lcm(*(layer["kv_heads"] for layer in layers)),
            -(-(chosen + words) // LANES) * LANES,
            frequencies=tuple(self.frequencies),
            attention_factor=self.attention_factor,
            sliding_window=max(windows),
            full_layers=tuple(number for number, window in enumerate(windows) if not window),
            chunk=max(layer["chunk"] for layer in layers),
            softcap=layers[0]["softcap"],
            sinks=sinks,
            chosen=chosen if words else 0,
            words=words,
        )


def parse(raw: JsonObject, window: int = 0) -> TracedConfig:
    """Trace the model that a raw config.json describes, for a context of ``window`` positions (0: all it was made for);
    :class:`ConfigError` if transformers or we cannot.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"config.json: model_type {raw['model_type']!r} has no family of its own, so it is traced from "
            "transformers' modelling code, which needs torch: install the extra trace (pip install 'stagegraph[trace]')"
        )
    from stages.tracing.trace import trace

    config = TracedConfig(**trace(raw, window))
    _check(config)
    return config


def _check(config: TracedConfig) -> None:
    """Refuse what the cache and its kernels do not compute."""
    layers = [arguments for name, arguments in config.parts["body"]["nodes"] if name == "attention"]
    heads = sorted({layer["heads"] for layer in layers})
    windows, chunks = (sorted({layer[each] for layer in layers if layer[each]}) for each in ("window", "chunk"))
    problems = []
    if len(heads) > 1:
        problems.append(f"layers of different numbers of heads, {heads}")
    if len(windows) > 1:
        problems.append(f"layers of different windows, {windows}")
    if chunks and (windows or len(chunks) > 1):
        problems.append(f"layers of different chunks, {chunks}, and windows, {windows}")
    if len({layer["softcap"] for layer in layers}) > 1:
        problems.append("layers of different soft caps of attention scores")
    if problems:
        raise ConfigError(
            *(
                f"config.json: {config.architecture} has {problem}, which no kernel here computes"
                for problem in problems
            )
        )


def context_window(config: TracedConfig, requested: int) -> int:
    """Return the positions to build for; :class:`ConfigError` for none, or for more than the model was made for."""
    most = config.max_positions
    if requested > most > 0:
        raise ConfigError(
            f"context_window = {requested} exceeds the {most} tokens that {config.architecture}'s attention reads all "
            f"of (of more it chooses some, which is not supported): choose context_window <= {most}"
            if _chooses(config)
            else f"context_window = {requested} exceeds max_position_embeddings = {most} of config.json, beyond which "
            f"the model was not trained: choose context_window <= {most}"
        )
    if not requested and not config.max_positions:
        raise ConfigError("config.json does not say for how many positions the model was made: set context_window")
    return requested or config.max_positions


def _chooses(config: TracedConfig) -> bool:
    """Say whether attention chooses among the tokens of contexts that the model was trained for."""
    return bool((config.source.get("max_position_embeddings") or 0) > config.max_positions > 0)


def for_context(config: TracedConfig, window: int) -> tuple[TracedConfig, str]:
    """Return the model as it is for so many positions, where it depends on them, and what to say."""
    note = (
        f"attention chooses among more than {config.max_positions} tokens, which is not supported: contexts end there"
        if _chooses(config)
        else ""
    )
    if not config.settled:
        return config, note
    if config.settled != window:
        config = parse(config.unsettled, window)
    if config.source.get("index_topk"):
        return config, note
    chosen = (
        f"rotary frequencies are chosen by length: all sequences use those for {window} positions, the "
        "context_window; transformers uses others for shorter sequences"
    )
    return config, "; ".join(filter(None, (note, chosen)))


def params(config: TracedConfig) -> tuple[Param, ...]:
    """Return the parameters in packed order; of a tied head there is none."""
    return tuple(
        Param(
            entry["name"],
            tuple(entry["shape"]),
            entry["kind"],
            tuple(entry["sources"]),
            tuple(tuple(shape) for shape in entry["source_shapes"]),
            entry["transform"],
        )
        for entry in config.parameters
        if not _is_tied_head(config, entry["name"])
    )


def _is_tied_head(config: TracedConfig, name: str) -> bool:
    return bool(config.tied and config.tie and name == config.tie[0])


def stored_as(config: TracedConfig, names: Collection[str]) -> TracedConfig:
    """Return the config of a checkpoint with tensors of these ``names``, some of which may be of an older form."""
    plain = {unwrapped(name) for name in names}
    ends = {end for name in plain for end in suffixes(name)}
    own = config.embedding.partition(".")[0] + "."
    config = replace(config, older={name: _named(form, plain) for name, form in config.older.items()})

    def form(name: str, shape: Sequence[int]) -> JsonObject:
        known = config.older.get(name)
        renamed = known is not None and name not in plain and plain.issuperset(known["sources"])
        if known is not None and (renamed or name.removeprefix(own) not in ends):
            return known
        return {"sources": [name], "shapes": [shape], "rows": []}

    entries = []
    for entry in config.parameters:
        forms = _whole([*map(form, entry["sources"], entry["source_shapes"])])
        sources, shapes = ([each for form in forms for each in form[part]] for part in ("sources", "shapes"))
        transform = "copy" if len(forms) < len(entry["sources"]) else entry["transform"]
        transform = "concat0" if len(sources) > len(forms) else transform
        entries.append({**entry, "sources": sources, "source_shapes": shapes, "transform": transform})
    return replace(config, parameters=entries)


def _named(form: JsonObject, names: Collection[str]) -> JsonObject:
    """Return an older form by the names of its sources that a checkpoint has."""
    others = form.get("others", [])
    return {**form, "sources": others} if others and all(name in names for name in others) else form


def _whole(forms: Sequence[JsonObject]) -> Sequence[JsonObject]:
    """Return the forms of a parameter's sources, one of the whole where they are all rows of one tensor in order."""
    first, rows = forms[0], [form["rows"] for form in forms]
    if not all(rows) or any(form["sources"] != first["sources"] for form in forms):
        return forms
    starts, ends = zip(*rows, strict=True)
    return [first] if starts == (0, *ends[:-1]) and ends[-1] == first["shapes"][0][0] else forms


def causal_lm(config: TracedConfig, make: Any) -> Any:
    """Return the module that replays the graphs on the parameters of ``make``."""
    from stages.models.replay import Recurrent, Traced

    return (Traced if config.attention else Recurrent)(config, params(config), make)


@dataclass(frozen=True)
class Joined:
    """Tensors of an older checkpoint as the one of ``shape`` that they are one under the other, or that the ``rows``
    from one to another of the only tensor are: arrays, or what has ``values()``, so that nothing is in memory before it
    is asked for.
    """

    parts: Sequence[Any]
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """How many values of an activation share a scale where the parts, which say so, are read with int8 activations;
        0 where they are not, or not in one way.
        """
        groups = {part.group for part in self.parts}
        return groups.pop() if len(groups) == 1 else 0

    def values(self) -> np.ndarray:
        """Return all of it."""
        arrays = [part if isinstance(part, np.ndarray) else part.values() for part in self.parts]
        (joined,) = arrays if len(arrays) == 1 else [np.concatenate(arrays)]
        return joined[slice(*self.rows)].reshape(self.shape) if self.rows else joined.reshape(self.shape)


def to_reference(config: TracedConfig, tensors: WeightValues) -> ReferenceModel:
    """Return transformers' class name, config keywords and state dict."""
    state, taken = dict(tensors), set()
    for name, form in config.older.items():
        if name not in state and all(source in tensors for source in form["sources"]):
            parts = [tensors[source] for source in form["sources"]]
            taken.update(form["sources"])
            joined = Joined(parts, tuple(form["shape"]), tuple(form["rows"]))
            state[name] = joined.values() if isinstance(parts[0], np.ndarray) else joined
    for name in taken:
        del state[name]
    if config.tied and config.tie:
        state[config.tie[0]] = state[config.tie[1]]
    return config.architecture, _read(config.source), state


def _read(value: Any) -> Any:
    """Return a value of ``source`` as Python has it: infinite numbers, which JSON cannot write, are objects there."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _read(v) for k, v in value.items()}
    return [_read(each) for each in value] if isinstance(value, list) else value


def family_of(family: Family, config: TracedConfig) -> Family:
    """Return the record of one traced model."""
    return replace(
        family,
        name=config.model_type,
        architectures=(config.architecture,),
        tied=(config.tie[0], config.tie[1]) if config.tie else None,
        recomputed=tuple(f".{name}" for name in config.unread),
        state="kv" if not config.remembers else "hybrid" if config.attention else "rnn",
    )


FAMILY = Family(
    name="traced",
    architectures=(),
    config=TracedConfig,
    parse=parse,
    context_window=context_window,
    for_context=for_context,
    params=params,
    causal_lm=causal_lm,
    to_reference=to_reference,
    keys={},
    of=family_of,
    stored_as=stored_as,
)
