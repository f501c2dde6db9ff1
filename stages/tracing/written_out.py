"""Replaces attention and experts that a modelling file writes out itself instead of calling transformers' interface.

Each function here takes the place of a method of one class of transformers, on the modules of one model alone. What is
added to scores and depends on the key alone (ALiBi's slope times its position) is a channel more of keys, of which
queries have the inverse of the scale.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

from stages.tracing import doors


def replace_written_out(model: Any, window: int) -> None:
    """Let every module of :data:`WRITTEN_OUT` call the doors, in contexts of ``window`` tokens."""
    for module in model.modules():
        module.built_for = window
        for method, function in WRITTEN_OUT.get(type(module).__name__, {}).items():
            setattr(module, method, functools.partial(function, module))


def _heads(module: Any, q: Any, k: Any, v: Any, scale: float, window: int = 0) -> Any:
    """Return attention, laid out as q [b, heads, n, d]."""
    return doors.attention(module, q, k, v, scaling=scale, sliding_window=window)[0].transpose(1, 2)


def _biased(module: Any, q: Any, k: Any, v: Any, scale: float, bias: Any) -> Any:
    """Return attention [b, n, heads, d] with ``bias`` [heads, n] of keys, scores being scale * q k + bias. Where it has
    more heads than keys, they are there for each of its own.
    """
    import torch

    k, v = (each.repeat_interleave(len(bias) // k.shape[1], 1) if len(bias) > k.shape[1] else each for each in (k, v))
    q = torch.cat([q, torch.full_like(q[..., :1], 1 / scale)], -1)
    k = torch.cat([k, bias[None, :, :, None]], -1)
    return doors.attention(module, q, k, v, scaling=scale)[0]


def gpt_neo(module: Any, q: Any, k: Any, v: Any, _mask: Any = None) -> tuple[Any, None]:
    """Take the place of ``GPTNeoSelfAttention._attn``, which scales nothing."""
    window = module.config.window_size if module.attention_type == "local" else 0
    return _heads(module, q, k, v, 1.0, window), None


def gpt_neox_japanese(module: Any, q: Any, k: Any, v: Any, _mask: Any = None) -> tuple[Any, None]:
    """Take the place of ``GPTNeoXJapaneseAttention._attn``."""
    return _heads(module, q, k, v, 1 / float(module.norm_factor)), None


def openai(module: Any, q: Any, k: Any, v: Any, _mask: Any = None, _weights: bool = False) -> list[Any]:
    """Take the place of ``Attention._attn`` of the first GPT, which is given keys transposed."""
    return [_heads(module, q, k.transpose(-1, -2), v, v.shape[-1] ** -0.5 if module.scale else 1.0)]


def xglm(module: Any, hidden_states: Any, **_more: Any) -> tuple[Any, None]:
    """Take the place of ``XGLMAttention.forward``."""
    shape = (*hidden_states.shape[:2], module.num_heads, module.head_dim)
    q, k, v = (
        getattr(module, name)(hidden_states).view(shape).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
    )
    y = doors.attention(module, q, k, v, scaling=module.scaling)[0]
    return module.out_proj(y.reshape(*hidden_states.shape[:2], -1)), None


def bloom(module: Any, hidden_states: Any, residual: Any, alibi: Any, **_more: Any) -> tuple[Any, None]:
    """Take the place of ``BloomAttention.forward``; alibi [heads, 1, n]."""
    q, k, v = module._reshape(module.query_key_value(hidden_states))  # noqa: SLF001 - transformers' own
    y = _biased(module, q, k, v, module.inv_norm_factor, alibi[:, 0])
    return module.dense(y.reshape(*hidden_states.shape[:2], -1)) + residual, None


def falcon(
    module: Any, hidden_states: Any, alibi: Any, position_embeddings: Any = None, **_more: Any
) -> tuple[Any, None]:
    """Take the place of ``FalconAttention.forward``; keys are not repeated for all queries that read them."""
    b, n, _ = hidden_states.shape
    qkv = module.query_key_value(hidden_states)
    if module.new_decoder_architecture or module.multi_query:
        qkv = qkv.view(b, n, module.num_kv_heads, -1, module.head_dim)
        q, k, v = qkv[..., :-2, :].reshape(b, n, module.num_heads, -1), qkv[..., -2, :], qkv[..., -1, :]
    else:
        q, k, v = module._split_heads(qkv)  # noqa: SLF001 - transformers' own
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    if alibi is None:
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        q, k = rotate(q, k, *position_embeddings)
        y = doors.attention(module, q, k, v, scaling=module.inv_norm_factor)[0]
    else:
        bias = alibi.reshape(module.num_heads, n) * module.inv_norm_factor
        y = _biased(module, q, k, v, module.inv_norm_factor, bias)
    return module.dense(y.reshape(b, n, -1)), None


def mpt(module: Any, hidden_states: Any, position_bias: Any, **_more: Any) -> tuple[Any, None]:
    """Take the place of ``MptAttention.forward``; position_bias [heads, 1, positions] counts back from the last."""
    import torch

    b, n, _ = hidden_states.shape
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    q, k, v = (each.reshape(b, n, module.n_heads, -1).transpose(1, 2) for each in qkv.chunk(3, dim=2))
    bias = -position_bias[:, 0, -2:-1] * torch.arange(n)
    y = _biased(module, q, k, v, module.softmax_scale, bias)
    return module.out_proj(y.reshape(b, n, -1)), None


def llama4(module: Any, hidden_states: Any) -> tuple[Any, None]:
    """Take the place of ``Llama4TextMoe.forward``, which lets every expert read every token: zeros where the token has
    not chosen it. An expert's input is weighted, not what it makes.
    """
    import torch

    x = hidden_states.reshape(-1, module.hidden_dim)
    scores, chosen = torch.topk(torch.nn.functional.linear(x, module.router.weight), module.top_k, dim=1)
    given = (x[:, None] * torch.sigmoid(scores)[..., None]).reshape(-1, module.hidden_dim)
    experts, linear = module.experts, torch.ops.stagegraph.expert_linear
    gate, up = linear(given, experts.gate_up_proj, chosen.reshape(-1), True).chunk(2, dim=-1)
    y = linear(up * experts.act_fn(gate), experts.down_proj, chosen.reshape(-1), True)
    return module.shared_expert(x) + y.reshape(*chosen.shape, -1).sum(1), None


def minimax(module: Any, hidden_states: Any, **_more: Any) -> tuple[Any, None]:
    """Take the place of ``MiniMaxLightningAttention.forward``: a state of k times v that fades by each head's rate."""
    import torch

    b, n, _ = hidden_states.shape
    qkv = module.act_fn(module.qkv_proj(hidden_states)).reshape(b, n, module.num_attention_heads, -1)
    q, k, v = qkv.split(module.head_dim, dim=3)
    steps = torch.ones_like(v[..., 0])
    y = torch.ops.stagegraph.ssm_scan(v, steps, -module.slope_rate.flatten(), k, q).reshape(b, n, -1)
    return module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * module.norm(y)), None


def recurrent_gemma(module: Any, input_states: Any, position_ids: Any, **_more: Any) -> tuple[Any, None]:
    """Take the place of ``RecurrentGemmaRecurrentBlock.forward``, which keeps states of its own."""
    import torch

    conv, x = module.conv_1d, module.linear_x(input_states).transpose(1, 2)
    x = torch.ops.stagegraph.causal_conv(x, conv.weight.squeeze(1), conv.bias).transpose(1, 2)
    return module.linear_out(module.rg_lru(x, position_ids) * module.act_fn(module.linear_y(input_states))), None


def real_gated(_module: Any, hidden_states: Any, recurrent_gate: Any, **_more: Any) -> tuple[Any, None]:
    """Take the place of ``RecurrentGemmaRglru._rnn_scan``; the state at a position of zero is zero as it is."""
    import torch

    return torch.ops.stagegraph.linear_scan(hidden_states, recurrent_gate), None


def doge(module: Any, hidden_states: Any, position_embeddings: Any, **_more: Any) -> tuple[Any, None]:
    """Take the place of ``DogeAttention.forward``, which adds to scores what it makes of each value."""
    import torch

    b, n, _ = hidden_states.shape
    names, rotate = ("q_proj", "k_proj", "v_proj"), sys.modules[type(module).__module__].apply_rotary_pos_emb
    q, k, v = (getattr(module, name)(hidden_states).view(b, n, -1, module.head_dim) for name in names)
    bias = torch.exp(module.A * torch.nn.functional.softplus(module.dt_proj(v.reshape(b, n, -1))))
    q, k, v = (each.transpose(1, 2) for each in (module.q_norm(q), module.k_norm(k), v))
    q, k = rotate(q, k, *position_embeddings)
    y = _biased(module, q, k, v, module.scaling, bias[0].transpose(0, 1))
    return module.o_proj(y.reshape(b, n, -1)), None


def jetmoe_gates(module: Any, x: Any) -> tuple[Any, Any]:
    """Take the place of ``JetMoeTopKGating.forward``; return the experts chosen for each token, and their weights."""
    import torch

    found, chosen = module.layer(x).float().topk(module.top_k, dim=1)
    return chosen, torch.softmax(found, dim=1)


def jetmoe(module: Any, layer_input: Any) -> Any:
    """Take the place of ``JetMoeMoE.forward``."""
    import torch

    x, linear = layer_input.reshape(-1, module.input_size), torch.ops.stagegraph.expert_linear
    chosen, gates = module.router(x)
    gate, up = linear(x, module.input_linear.weight, chosen.reshape(-1), False).chunk(2, dim=-1)
    y = linear(module.activation(gate) * up, module.output_linear.weight, chosen.reshape(-1), False)
    return (y.view(*chosen.shape, -1) * gates[..., None]).sum(1).view(layer_input.shape) + module.bias


def jetmoe_queries(module: Any, layer_input: Any) -> tuple[Any, None, tuple[Any, Any]]:
    """Take the place of ``JetMoeMoA.map``: queries of each chosen expert."""
    import torch

    x = layer_input.reshape(-1, module.input_size)
    chosen, gates = module.router(x)
    q = torch.ops.stagegraph.expert_linear(x, module.input_linear.weight, chosen.reshape(-1), False)
    return q.view(*layer_input.shape[:2], module.top_k, -1), None, (chosen, gates)


def jetmoe_outputs(module: Any, layer_input: Any, routing: tuple[Any, Any]) -> Any:
    """Take the place of ``JetMoeMoA.reduce``: what chosen experts make of the attention to their own queries."""
    import torch

    chosen, gates = routing
    x = layer_input.reshape(-1, module.hidden_size)
    y = torch.ops.stagegraph.expert_linear(x, module.output_linear.weight, chosen.reshape(-1), False)
    y = (y.view(*chosen.shape, -1) * gates[..., None]).sum(1)
    return y.view(*layer_input.shape[:2], -1) + module.bias


def longcat(module: Any, x: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """Take the place of ``LongcatFlashExperts.forward``, of which the last experts hand on what they are given."""
    import torch

    chosen, linear = top_k_index.reshape(-1), torch.ops.stagegraph.expert_linear
    gate, up = linear(x, module.gate_up_proj, chosen, False).chunk(2, dim=-1)
    there = chosen.clamp(
        max=module.num_routed_experts - 1
    )  # down_proj has none of the others, and kernels do not check
    y = linear(module.act_fn(gate) * up, module.down_proj, there, False).view(*top_k_index.shape, -1)
    y = torch.where((top_k_index < module.num_routed_experts)[..., None], y, x[:, None])
    return (y * top_k_weights[..., None]).sum(1)


def zaya(module: Any, hidden_states: Any, *_more: Any) -> tuple[Any, Any, Any]:
    """Take the place of ``ZayaCCAProjection.forward``: q, k and v [b, n, heads, d], of which convolutions mix the first
    two, and half of each value is the token's before.
    """
    import torch

    shape, taps = (*hidden_states.shape[:2], -1, module.head_dim), module.conv_qk_depthwise
    q, k = module.q_proj(hidden_states), module.k_proj(hidden_states)
    mixed = torch.ops.stagegraph.causal_conv(torch.cat([q, k], -1).transpose(1, 2), taps.weight.squeeze(1), None)
    q_mixed, k_mixed = _grouped(module.conv_qk_grouped, mixed, taps.bias).split([q.shape[-1], k.shape[-1]], -1)
    shared = k.view(shape).repeat_interleave(module.num_key_value_groups, 2)
    residual = (q.view(shape) + shared) * 0.5
    mean = residual.unflatten(2, (-1, module.num_key_value_groups)).mean(3)
    v, late = module.v_proj_current(hidden_states), module.v_proj_delayed
    delayed = _before(torch.ops.stagegraph.linear(hidden_states, late.weight, None).transpose(1, 2), 1).transpose(1, 2)
    delayed = delayed if late.bias is None else delayed + late.bias
    return q_mixed.view(shape) + residual, k_mixed.view(shape) + mean, torch.cat([v, delayed], -1).view(shape)


def _grouped(conv: Any, x: Any, before: Any) -> Any:
    """Return [b, n, channels]: the convolution ``conv`` in groups of x [b, channels, n] + ``before`` [channels], which
    is also what stands before the first token.
    """
    weight = conv.weight.unflatten(0, (conv.groups, -1))  # [groups, out, in, taps]
    last, shifted = conv.kernel_size[0] - 1, before[:, None]
    made = [
        weight[..., tap] @ (_before(x, last - tap) + shifted).unflatten(1, (conv.groups, -1)) for tap in range(last + 1)
    ]
    return sum(made).flatten(1, 2).transpose(1, 2) + conv.bias


def _before(x: Any, steps: int) -> Any:
    """Return x [b, channels, n] of so many tokens before, zeros where there are none."""
    import torch

    if not steps:
        return x
    taps = torch.cat([torch.ones(x.shape[1], 1), torch.zeros(x.shape[1], steps)], 1)
    return torch.ops.stagegraph.causal_conv(x, taps, None)


def gemma3n(module: Any, inputs: Any) -> Any:
    """Take the place of ``Gemma3nTextMLP._gaussian_topk``, which computes from a distribution what is one number."""
    import torch

    deviations = NormalDist().inv_cdf(module.activation_sparsity)
    spread = inputs.var(dim=-1, keepdim=True, correction=0).sqrt()
    return torch.relu(inputs - (inputs.mean(dim=-1, keepdim=True) + spread * deviations))


def indexer(
    module: Any,
    hidden_states: Any,
    q_resid: Any,
    position_embeddings: Any,
    _mask: Any,
    position_ids: Any,
    *,
    rotation: str = "apply_rotary_pos_emb",
    turned_last: bool = False,
    **_more: Any,
) -> Any:
    """Take the place of an indexer's ``forward``, which chooses the tokens that a query attends to."""
    import torch

    turned, rotate = module.qk_rope_head_dim, vars(sys.modules[type(module).__module__])[rotation]
    q = module.wq_b(q_resid).view(*hidden_states.shape[:2], module.n_heads, module.head_dim)
    k = module.k_norm(module.wk(hidden_states)).unsqueeze(2)
    sizes = [module.head_dim - turned, turned] if turned_last else [turned, module.head_dim - turned]
    parts = [list(each.split(sizes, dim=-1)) for each in (q, k)]
    at = 1 if turned_last else 0
    both = rotate(parts[0][at], parts[1][at], *position_embeddings, unsqueeze_dim=2)
    for part, found in zip(parts, both, strict=True):
        part[at] = found
    q, k = (torch.cat(part, -1) for part in parts)
    weights = module.weights_proj(hidden_states) * (module.n_heads**-0.5 * module.softmax_scale)
    count, context = int(module.index_topk), int(module.built_for)
    return torch.ops.stagegraph.choose(q, k.squeeze(2), weights, position_ids, count, context)


def without_mask(module: Any, *arguments: Any, **keywords: Any) -> Any:
    """Take the place of a ``forward`` that goes on with the mask it made, and give it one that says nothing."""
    import torch

    forward = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    names = {**forward.__globals__, "create_causal_mask": lambda **_keywords: torch.zeros(1, 1, 1, 1)}
    made = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made(module, *arguments, **keywords)


# Families whose attention reads the tokens that an indexer chooses -> how theirs differs.
INDEXED: dict[str, dict[str, Any]] = {
    "DeepseekV32": {},
    "AXK2": {},
    "GlmMoeDsa": {"rotation": "apply_rotary_pos_emb_interleave"},
    "HYV4": {"turned_last": True},
}
# Class of transformers -> method -> what takes its place.
WRITTEN_OUT: dict[str, dict[str, Callable[..., Any]]] = {
    "GPTNeoSelfAttention": {"_attn": gpt_neo},
    "GPTNeoXJapaneseAttention": {"_attn": gpt_neox_japanese},
    "Attention": {"_attn": openai},
    "XGLMAttention": {"forward": xglm},
    "BloomAttention": {"forward": bloom},
    "FalconAttention": {"forward": falcon},
    "MptAttention": {"forward": mpt},
    "MptModel": {"forward": without_mask},
    "Llama4TextMoe": {"forward": llama4},
    "LongcatFlashExperts": {"forward": longcat},
    "MiniMaxLightningAttention": {"forward": minimax},
    "RecurrentGemmaRecurrentBlock": {"forward": recurrent_gemma},
    "RecurrentGemmaRglru": {"_rnn_scan": real_gated},
    "DogeAttention": {"forward": doge},
    "JetMoeTopKGating": {"forward": jetmoe_gates},
    "JetMoeMoE": {"forward": jetmoe},
    "JetMoeMoA": {"map": jetmoe_queries, "reduce": jetmoe_outputs},
    **{f"{name}Model": {"forward": without_mask} for name in INDEXED},
    **{f"{name}Indexer": {"forward": functools.partial(indexer, **how)} for name, how in INDEXED.items()},
    "ZayaCCAProjection": {"forward": zaya},
    "Gemma3nTextMLP": {"_gaussian_topk": gemma3n},
}
