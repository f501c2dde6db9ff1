"""The layers of RWKV-4, and the recurrent state that they read and write in place of a KV cache.

The residual stream is float32 whatever the compute dtype, for its size grows with the layers; matrices are applied in
the compute dtype. All rows are tokens of b sequences laid end to end, ``ends`` int32 [b] the last row of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import relax as rx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Object, Tensor, op

from stages.kernels import wkv
from stages.models.layers import Embedding, LayerFactory, Linear
from stages.models.matrices import take


@dataclass(frozen=True)
class StateTensor:
    """One tensor that every layer keeps of every sequence: [width] of ``dtype``, ``initial`` before the first token."""

    width: int
    dtype: str
    initial: float = 0.0


class RecurrentState(Object):
    """The states of all layers and sequences, as the runtime holds them."""

    def get(self, layer: int, number: int, batch: object, tensor: StateTensor) -> Tensor:
        """Return state ``number`` of ``layer`` for the ``batch`` sequences of this call, [b, width]."""
        arguments = [self._expr, rx.prim_value(layer), rx.prim_value(number)]
        ty = rx.TensorType((batch, tensor.width), tensor.dtype)
        return op.wrap_nested(rx.call_dps_packed("vm.builtin.rnn_state_get", arguments, out_ty=ty), "state")

    def set(self, layer: int, number: int, value: Tensor) -> RecurrentState:
        """Return the state after ``value`` [b, width] became state ``number`` of ``layer``."""
        arguments = (self._expr, rx.prim_value(layer), rx.prim_value(number), value._expr)  # noqa: SLF001
        call = rx.call_pure_packed("vm.builtin.rnn_state_set", *arguments, ty_args=rx.AnyType())
        return RecurrentState(_expr=call, _name="state")


class Float32LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; takes and yields float32."""

    def __init__(self, make: LayerFactory, name: str, width: int, eps: float) -> None:
        self.weight = make.vector(f"{name}.weight", (width,))
        self.bias = make.vector(f"{name}.bias", (width,))
        self.width = width
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return op.layer_norm(x, self.width, self.weight, self.bias, self.eps)


class Mix(nn.Module):
    """Per channel a weighted mean of a token's row and the row before it."""

    def __init__(self, make: LayerFactory, name: str, width: int) -> None:
        self.weight = make.vector(name, (1, 1, width))

    def forward(self, x: Tensor, shifted: Tensor, dtype: str) -> Tensor:
        """Return it for x and shifted [r, h], in ``dtype``."""
        weight = op.reshape(self.weight, (1, self.weight.shape[-1]))
        mixed = x.astype("float32") * weight + shifted.astype("float32") * (1.0 - weight)
        return mixed.astype(dtype)


@dataclass(frozen=True)
class Tokens:
    """What a layer needs to know of a call beside its rows: last row of each sequence, int32 [b], and the states."""

    ends: Tensor
    states: tuple[StateTensor, ...]

    def shift(self, x: Tensor, state: RecurrentState, layer: int, number: int) -> tuple[Tensor, RecurrentState]:
        """Return the row before each row of x [r, h], and the state, whose ``number`` becomes each last row."""
        before = state.get(layer, number, self.ends.shape[0], self.states[number])
        kernel = wkv.token_shift(x.shape[-1], x.dtype)
        shifted = op.tensor_ir_op(kernel, "token_shift", [x, before, self.ends], Tensor.placeholder(x.shape, x.dtype))
        return shifted, state.set(layer, number, take(x, self.ends))


class TimeMixing(nn.Module):
    """What stands in the place of attention: out(sigmoid(r) * wkv(k, v))."""

    def __init__(self, make: LayerFactory, name: str, width: int, attention_width: int) -> None:
        self.decay = make.vector(f"{name}.time_decay", (attention_width,))
        self.bonus = make.vector(f"{name}.time_first", (attention_width,))
        self.mix_key = Mix(make, f"{name}.time_mix_key", width)
        self.mix_value = Mix(make, f"{name}.time_mix_value", width)
        self.mix_receptance = Mix(make, f"{name}.time_mix_receptance", width)
        self.key = make.linear(f"{name}.key", attention_width, width)
        self.value = make.linear(f"{name}.value", attention_width, width)
        self.receptance = make.linear(f"{name}.receptance", attention_width, width)
        self.output = _widened(make.linear(f"{name}.output", width, attention_width))

    def forward(self, x: Tensor, state: RecurrentState, tokens: Tokens, layer: int) -> tuple[Tensor, RecurrentState]:
        """Return float32 [r, h] of the normalised rows x [r, h], and the state after them."""
        shifted, state = tokens.shift(x, state, layer, 1)
        key = self.key(self.mix_key(x, shifted, x.dtype))
        value = self.value(self.mix_value(x, shifted, x.dtype))
        receptance = op.sigmoid(self.receptance(self.mix_receptance(x, shifted, x.dtype)))
        states = [state.get(layer, number, tokens.ends.shape[0], tokens.states[number]) for number in (2, 3, 4)]
        y, *after = op.tensor_ir_op(
            wkv.wkv(key.shape[-1], key.dtype),
            "wkv",
            [key, value, self.decay, self.bonus, *states, tokens.ends],
            [Tensor.placeholder(like.shape, like.dtype) for like in (key, *states)],
        )
        for number, tensor in zip((2, 3, 4), after, strict=True):
            state = state.set(layer, number, tensor)
        return self.output(receptance * y), state


class ChannelMixing(nn.Module):
    """What stands in the place of the MLP: sigmoid(r) * value(relu(key) ** 2)."""

    def __init__(self, make: LayerFactory, name: str, width: int, inner: int) -> None:
        self.mix_key = Mix(make, f"{name}.time_mix_key", width)
        self.mix_receptance = Mix(make, f"{name}.time_mix_receptance", width)
        self.key = make.linear(f"{name}.key", inner, width)
        self.receptance = make.linear(f"{name}.receptance", width, width)
        self.value = _widened(make.linear(f"{name}.value", width, inner))

    def forward(self, x: Tensor, state: RecurrentState, tokens: Tokens, layer: int) -> tuple[Tensor, RecurrentState]:
        """Return float32 [r, h] of the normalised rows x [r, h], and the state after them."""
        shifted, state = tokens.shift(x, state, layer, 0)
        key = op.relu(self.key(self.mix_key(x, shifted, x.dtype)))
        receptance = op.sigmoid(self.receptance(self.mix_receptance(x, shifted, x.dtype)))
        return receptance.astype("float32") * self.value(key * key), state


class Block(nn.Module):
    """x + time mixing(norm(x)), then x + channel mixing(norm(x))."""

    def __init__(
        self, norm1: Float32LayerNorm, time: TimeMixing, norm2: Float32LayerNorm, channel: ChannelMixing
    ) -> None:
        self.norm1 = norm1
        self.time = time
        self.norm2 = norm2
        self.channel = channel

    def forward(
        self, x: Tensor, state: RecurrentState, tokens: Tokens, layer: int, dtype: str
    ) -> tuple[Tensor, RecurrentState]:
        """Apply the layer of that number to the float32 rows x [r, h], computing in ``dtype``."""
        y, state = self.time(self.norm1(x).astype(dtype), state, tokens, layer)
        x = x + y
        y, state = self.channel(self.norm2(x).astype(dtype), state, tokens, layer)
        return x + y, state


class RecurrentLM(nn.Module):
    """Token embedding, first norm, blocks, final norm, head; parameters are packed in this order.

    ``states`` describes what each of the ``state_layers`` keeps: the previous row of the channel mixing and of the time
    mixing, in the compute dtype because they are such rows, and sum, norm and peak of the weighted average, always
    float32.
    """

    def __init__(
        self,
        make: LayerFactory,
        embedding: Embedding,
        first_norm: Float32LayerNorm,
        blocks: Sequence[Block],
        norm: Float32LayerNorm,
        head: Linear,
        *,
        width: int,
        attention_width: int,
    ) -> None:
        self.embedding = embedding
        self.first_norm = first_norm
        self.blocks = nn.ModuleList(list(blocks))
        self.norm = norm
        self.head = head
        self.compute_dtype = make.compute_dtype
        rows = StateTensor(width, make.compute_dtype)
        average = StateTensor(attention_width, "float32")
        self.states = (rows, rows, average, average, StateTensor(attention_width, "float32", -1e30))
        self.state_layers = len(blocks)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [s] int32 -> embeddings [s, h] in the compute dtype."""
        return self.embedding(ids)

    def hidden(self, x: Tensor, state: RecurrentState, ends: Tensor) -> tuple[Tensor, RecurrentState]:
        """Embeddings [r, h] -> normalised hidden states [b, h] of the rows ``ends``, and the state after all rows."""
        tokens = Tokens(ends, self.states)
        x = self.first_norm(x.astype("float32"))
        for number, block in enumerate(self.blocks):
            x, state = block(x, state, tokens, number, self.compute_dtype)
        return self.norm(take(x, ends)).astype(self.compute_dtype), state

    def logits(self, x: Tensor) -> Tensor:
        """Normalised hidden states [..., h] -> logits [..., V] in float32."""
        return self.head(x)


def _widened(linear: Linear) -> Linear:
    """Let ``linear`` yield float32: what is added to the residual stream."""
    linear.out_dtype = "float32"
    return linear
