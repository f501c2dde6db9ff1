"""What prefill and decode share: from their first argument to the hidden states of the trunk."""

from __future__ import annotations

from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from stages.models.layers import CausalLM


def hidden_states(model: CausalLM, states: Tensor, cache: PagedKVCache) -> Tensor:
    """Embeddings [b, s, h], or ids int32 [b, s] if embedding is inside -> normalised hidden states [b, s, h]."""
    if len(states.shape) == 2:
        batch, seq = states.shape
        embedded = model.embed(op.reshape(states, (batch * seq,)))
        states = op.reshape(embedded, (batch, seq, embedded.shape[-1]))
    return model.hidden(states, cache)
