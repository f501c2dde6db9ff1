"""Replaces transformers' attention, masks and experts by single operators while a model is traced.

transformers calls the attention function that is registered under a name with the queries, keys and values after
rotation; here that function is an operator of one node.
"""

from __future__ import annotations

import functools
from typing import Any

from stages.checkpoint.errors import ConfigError
from stages.sizes import words_of

NAME = "stagegraph"
# What attention is handed that changes nothing for one whole sequence after another.
HARMLESS = {
    *("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "layer_idx"),
    *("is_causal", "return_dict", "target_dtype", "position_embeddings", "past_key_values"),
}
_OPERATORS = {
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? chosen, float scale, float softcap, int window,"
    " int chunk) -> Tensor",
    "linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
    # x [t, k], weight [experts, n, k], or [experts, k, n] if it is transposed, chosen [t * c] -> [t * c, n]
    "expert_linear": "(Tensor x, Tensor weight, Tensor chosen, bool transposed) -> Tensor",
    # x [b, channels, n], weight [channels, taps] -> as x
    "causal_conv": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    # x [b, n, heads, width], dt [b, n, heads], a [heads], b and c [b, n, groups, size] -> as x
    "ssm_scan": "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c) -> Tensor",
    # x and dt [b, channels, n], a [channels, size], b and c [b, size, n] -> as x
    "selective_scan": "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c) -> Tensor",
    # x and fade [b, n, channels] -> as x
    "linear_scan": "(Tensor x, Tensor fade) -> Tensor",
    # q and k [b, n, key heads, size], v [b, n, heads, width], decay [b, n, heads] or [b, n, heads, size],
    # beta [b, n, heads] -> as v
    "delta_rule": "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta) -> Tensor",
    # q [b, n, heads, size], k [b, n, size], weights [b, n, heads], positions [b, n] -> [b, n, words]: which tokens a
    # query attends to, stages.kernels.cpu.choose
    "choose": "(Tensor q, Tensor k, Tensor weights, Tensor positions, int count, int context) -> Tensor",
    # marks of stages.tracing.repeats: of an input and of a result of a traced layer, and what stands for another layer
    "enter": "(Tensor x, int call, int place) -> Tensor",
    "leave": "(Tensor x, int call, int place) -> Tensor",
    "again": "(Tensor[] x, int[] like, int call, int layer) -> Tensor[]",
}


@functools.cache
def install() -> None:
    """Register the operators with torch and the doors with transformers, once."""
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    make: Any = torch.library.Library  # which is not typed
    library = make(NAME, "DEF")
    for name, signature in _OPERATORS.items():
        library.define(name + signature)
    install.library = library  # type: ignore[attr-defined]  # operators go when it does

    @torch.library.register_fake(f"{NAME}::attention")
    def _attention(q: Any, _k: Any, v: Any, *_more: Any) -> Any:
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])

    @torch.library.register_fake(f"{NAME}::linear")
    def _linear(x: Any, weight: Any, *_more: Any) -> Any:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.register_fake(f"{NAME}::rms_norm")
    def _rms_norm(x: Any, *_more: Any) -> Any:
        return torch.empty_like(x)

    @torch.library.register_fake(f"{NAME}::expert_linear")
    def _expert_linear(x: Any, weight: Any, chosen: Any, transposed: bool) -> Any:
        return x.new_empty(chosen.shape[0], weight.shape[2 if transposed else 1])

    @torch.library.register_fake(f"{NAME}::again")
    def _again(x: Any, like: Any, *_more: Any) -> Any:
        return [torch.empty_like(x[at]) for at in like]

    @torch.library.register_fake(f"{NAME}::choose")
    def _choose(q: Any, _k: Any, _weights: Any, _positions: Any, _count: int, context: int) -> Any:
        return q.new_empty(q.shape[0], q.shape[1], words_of(context))

    first = ("enter", "leave", "causal_conv", "ssm_scan", "selective_scan", "linear_scan")
    for name, at in (*((name, 0) for name in first), ("delta_rule", 2)):
        torch.library.register_fake(f"{NAME}::{name}")(lambda *given, at=at: torch.empty_like(given[at]))

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *_arguments, **_keywords: None)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


def attention(
    module: Any,
    q: Any,
    k: Any,
    v: Any,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - part of the interface
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    indices: Any = None,
    **more: Any,
) -> tuple[Any, None]:
    """Take the place of attention: q [b, heads, n, d], k and v [b, kv heads, n, d] -> [b, n, heads, d]. ``indices`` are
    what ``choose`` made; a mask of one number hides nothing.
    """
    import torch

    where = type(module).__name__
    causal = more["is_causal"] if more.get("is_causal") is not None else getattr(module, "is_causal", True)
    if not causal:
        raise ConfigError(f"{where} attends to later tokens too: this is no decoder")
    strange = sorted(name for name, value in more.items() if value is not None and name not in HARMLESS)
    if attention_mask is not None and attention_mask.numel() > 1:
        strange.append("attention_mask")
    if strange:
        raise ConfigError(f"{where}: attention with {', '.join(strange)} is not supported")
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    reach = int(sliding_window or 0), module.attended_chunk
    made = torch.ops.stagegraph.attention(q, k, v, s_aux, indices, scale, float(softcap or 0), *reach)
    return made, None


def settle_chunks(model: Any) -> None:
    """Note at each module how many tokens the chunks have that it attends within, 0 if it does not.

    Its mask alone would say so, and its config says it by the number of its layer.
    """
    for module in model.modules():
        config, number = getattr(module, "config", None), getattr(module, "layer_idx", None)
        kinds = getattr(config, "layer_types", None) or []
        # A part beside the layers may count on, or from below zero.
        chunked = isinstance(number, int) and 0 <= number < len(kinds) and kinds[number] == "chunked_attention"
        module.attended_chunk = int(config.attention_chunk_size or 0) if config is not None and chunked else 0


def experts(module: Any, x: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """Take the place of a mixture's experts: x [t, k], the experts chosen for each token and their weights [t, c].

    The layers of the chosen experts are operators; what is between and after them is transformers' own code.
    """
    import torch

    if module.has_post_expert_norm:
        raise ConfigError(f"{type(module).__name__}: a norm after each expert is not supported")
    chosen = top_k_index.reshape(-1)

    def layer(y: Any, name: str) -> Any:
        made = torch.ops.stagegraph.expert_linear(y, getattr(module, name), chosen, module.is_transposed)
        return (
            made + torch.nn.functional.embedding(chosen, getattr(module, f"{name}_bias")) if module.has_bias else made
        )

    y = module._apply_gate(layer(x, "gate_up_proj")) if module.has_gate else module.act_fn(layer(x, "up_proj"))  # noqa: SLF001
    y = layer(y, "down_proj").view(*top_k_index.shape, x.shape[-1])
    return (y * top_k_weights.unsqueeze(-1)).sum(1).to(x.dtype)
