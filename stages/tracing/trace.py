"""Traces a whole model into one document: graphs of embedding, body and head, their parameters and constants."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError
from stages.tracing import doors, hollow, leaves, older
from stages.tracing.export import EXAMPLE, export
from stages.tracing.graph import GraphPart
from stages.tracing.merge import merged, projected, read
from stages.tracing.names import Names
from stages.tracing.repeats import NotAlikeError, folded, unfold
from stages.tracing.rotation import by_part, hoisted, packed
from stages.tracing.routers import routers
from stages.tracing.sequences import sequential
from stages.tracing.source import open_source, positions_of, written

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stages.documents.files import JsonObject
    from stages.tracing.source import TracedSource

# Keys of config.json that say nothing of the model.
SILENT = ("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "quantization_config")


def trace(raw: JsonObject, window: int = 0) -> JsonObject:
    """Return the fields of :class:`stages.models.traced.TracedConfig` for a config.json, built for ``window`` positions
    (0: all that the model was made for).

    :class:`ConfigError` says in one line what of the model cannot be built.
    """
    source = open_source(raw, window)
    model = source.model
    if model.get_input_embeddings() is None or not _body_name(model):
        raise ConfigError(f"{source.cls.__name__} has no body that reads embeddings: a family of its own is needed")
    doors.settle_chunks(model)
    leaves.settle_rotation(model)
    leaves.replace_norms(model)
    leaves.replace_linear(model)
    names = Names(model)
    known = older.forms(model, names.stored)
    with sequential(model):
        parts, hidden, vocab = _parts(source, names)
    parts["body"] = projected(parts["body"])
    apart = routers(parts["body"], names.shapes)
    parts["body"], merges = merged(parts["body"], names.shapes, names.turned | apart, known)
    parts["body"], rotation = hoisted(parts["body"], names.constants)
    parts["body"] = packed(parts["body"])
    parts["body"], by_head = by_part(parts["body"], names.turned)
    attention = [arguments for part in parts.values() for name, arguments in part.nodes if name == "attention"]
    if not attention and not any(name == "causal_conv" for name, _ in parts["body"].nodes):
        raise ConfigError(f"{source.cls.__name__}: its attention does not use transformers' attention interface")
    if not attention and any(1 in read([*arguments.values()], "value") for _, arguments in parts["body"].nodes):
        raise ConfigError(
            f"{source.cls.__name__} reads positions, which the KV cache counts, and none of its layers has attention"
        )
    return {
        "model_type": source.config.model_type,
        "architecture": source.cls.__name__,
        "wrapper": source.wrapper,
        "source": written({key: value for key, value in source.config.to_dict().items() if key not in SILENT}),
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": source.config.num_hidden_layers,
        "max_positions": positions_of(source.config),
        "frequencies": list(rotation.frequencies) if rotation else [],
        "attention_factor": rotation.factor if rotation else 1.0,
        "settled": source.settled,
        "unsettled": dict(raw) if source.settled else {},
        "tied": names.tied,
        "tie": names.tie,
        "embedding": next(iter(names.used)),
        "parts": {name: asdict(part) for name, part in parts.items()},
        "parameters": _parameters(parts, names, merges, apart, by_head),
        "constants": names.constants,
        "unread": names.unused(),
        "older": known,
    }


def _body_name(model: Any) -> str:
    """Return the attribute of a model that is all of it but the head, "" if there is none."""
    return next((name for name in (model.base_model_prefix, "model") if name and hasattr(model, name)), "")


def _parts(source: TracedSource, names: Names) -> tuple[dict[str, GraphPart], int, int]:
    """Return the graphs, the width of the body's states, and how many logits there are."""
    import torch

    model, prefix = source.model, _body_name(source.model)
    table, body = model.get_input_embeddings(), getattr(model, prefix)
    own = body.get_per_layer_inputs if getattr(body, "hidden_size_per_layer_input", 0) else None

    def embeddings(ids: Any) -> Any:
        """Layers may have tables of their own: what they say of a token stands behind its embedding."""
        found = table(ids)
        return torch.cat([found, own(ids).flatten(1)], -1) if own else found

    ids = torch.zeros(EXAMPLE, dtype=torch.long)
    with hollow.without_layers(model):
        embed, (hidden,) = export(model, embeddings, [ids], names, [0])
    each = [*own(ids).shape[1:]] if own else []
    width = hidden - (math.prod(each) if own else 0)
    positions = torch.arange(EXAMPLE)[None]
    most = max(positions_of(source.config), EXAMPLE + 1) if positions_of(source.config) else 0
    kinds: list[Any] = []

    def states(x: Any, positions: Any) -> Any:
        more = {"per_layer_inputs": x[..., width:].unflatten(-1, each)} if own else {}
        found = body(inputs_embeds=x[..., :width], position_ids=positions, use_cache=False, **more)
        kinds.append(type(found))
        return found.last_hidden_state

    trunk, size = _trunk(model, states, [torch.zeros(1, EXAMPLE, hidden), positions], names, most)

    class Given(torch.nn.Module):
        """Stands where the body was, whose states are given."""

        def forward(self, *_arguments: Any, **_keywords: Any) -> Any:
            return kinds[0](last_hidden_state=given)

    given: Any = None

    def logits(x: Any) -> Any:
        nonlocal given
        given = x
        return model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits

    stand_in = Given()
    # A head may call a part of the body, as OPT's calls its decoder.
    vars(stand_in).update(dict.fromkeys((name for name, _ in body.named_children()), stand_in))
    # Or read a number of it, as Falcon H1's reads what logits are multiplied by.
    vars(stand_in).update({name: value for name, value in vars(body).items() if type(value) in (int, float)})
    setattr(model, prefix, stand_in)
    names.in_head = True
    head, (_, vocab) = export(model, logits, [torch.zeros(1, EXAMPLE, size)], names, [1])
    return {"embed": embed, "body": trunk, "head": head}, hidden, vocab


def _trunk(
    model: Any, states: Callable[..., Any], inputs: Sequence[Any], names: Names, most: int
) -> tuple[GraphPart, int]:
    """Return the graph of the body, of which alike layers are traced once where they can be, and its width."""
    with folded(model) as repeats:
        try:
            trunk, (_, size) = export(model, states, inputs, names, [1, 1], most, partial(unfold, repeats=repeats))
        except (NotAlikeError, ConfigError):
            if not repeats.names:
                raise
        else:
            return trunk, size
    trunk, (_, size) = export(model, states, inputs, names, [1, 1], most)
    return trunk, size


def _parameters(
    parts: Mapping[str, GraphPart],
    names: Names,
    merges: Mapping[str, Sequence[str]],
    deciding: set[str],
    by_head: Mapping[str, int],
) -> list[JsonObject]:
    """Return the parameters in packed order, each with its kind and the tensors that it is made of."""
    uses: dict[str, set[str]] = {}
    for place, part in parts.items():
        for name, arguments in part.nodes:
            for argument, value in arguments.items():
                for parameter in read(value, "parameter"):
                    uses.setdefault(parameter, set()).add(f"{name}.{argument}@{place}")
    into = {name: (new, old) for new, old in merges.items() for name in old}
    found = []
    for name in names.used:
        new, sources = into.get(name, (name, [name]))
        if name != sources[0] or new not in uses:
            continue
        if name in names.stacks:
            found.append(_stack(name, names))
            continue
        shapes = [names.shapes[source] for source in sources]
        stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        turned = name in names.turned
        plain = f"interleaved_qkv:{by_head[new]}" if new in by_head else "copy" if stacked else "scalar"
        found.append(
            {
                "name": new,
                "shape": [*(reversed(stacked) if turned else stacked)] or [1],
                "kind": "router" if new in deciding else _kind(uses[new], stacked),
                "sources": [*sources],
                "source_shapes": [[*shape] for shape in shapes],
                "transform": "transpose" if turned else "concat0" if len(shapes) > 1 else plain,
            }
        )
    return found


def _stack(name: str, names: Names) -> JsonObject:
    """Return the parameter that the matrices of a mixture's experts are, one under the other."""
    source, turned = names.stacks[name]
    return {
        "name": name,
        "shape": [*names.used[name]],
        "kind": "linear",
        "sources": [source],
        "source_shapes": [[*names.shapes[source]]],
        "transform": "stacked_transpose" if turned else "stacked_copy",
    }


def _kind(uses: set[str], shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        kinds = {
            "linear.weight@body": "linear",
            "linear.weight@embed": "linear",
            "linear.weight@head": "head",
            "embedding.weight@embed": "embedding",
        }
        return kinds.get(next(iter(uses)), "vector") if len(uses) == 1 else "vector"
    if len(shape) == 1:
        return "norm" if any("norm.weight" in use for use in uses) else "bias"
    return "vector"
