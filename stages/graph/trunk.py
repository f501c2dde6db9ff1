"""Shared by prefill and decode: the computation from their first argument to the hidden states."""

from __future__ import annotations

from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from stages.models.layers import CausalLM


def hidden_states(model: CausalLM, states: Tensor, cache: PagedKVCache) -> Tensor:
    """Embeddings [b, s, h], or ids int32 [b, s] if embedding is inside -> normalised hidden states [1, b * s, h].

    All tokens are rows of one batch, for nothing but the cache knows of sequences: so the kernels of a batch of decode
    steps are those of a prefill.
    """
    rows = states.shape[0] * states.shape[1]
    if len(states.shape) == 2:
        states = model.embed(op.reshape(states, (rows,)))
    return model.hidden(op.reshape(states, (1, rows, states.shape[-1])), cache)
