"""The layers every family is composed of, and the factory that gives them the parameters registered for a build.

A parameter keeps its storage dtype; arithmetic happens in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from stages.documents.params import Parameter, Register
from stages.models.matrices import FloatMatrix, GroupMatrix, Layout, Matrix, ScaledMatrix
from stages.sizes import level_blocks, level_words


class Linear(nn.Module):
    """x [..., k] -> x @ W.T (+ bias), [..., n], in ``out_dtype`` (the compute dtype where it is empty)."""

    def __init__(self, weight: Matrix, bias: nn.Parameter | None = None, out_dtype: str = "") -> None:
        self.weight = weight
        self.bias = bias
        self.out_dtype = out_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        y = op.matmul(x, op.permute_dims(self.weight.matrix()), out_dtype=self.out_dtype or None)
        return y if self.bias is None else y + self.bias.astype(y.dtype)


class Embedding(nn.Module):
    """ids [s] int32 -> rows of the table, [s, h] in the compute dtype."""

    def __init__(self, weight: Matrix) -> None:
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """Look ``ids`` up."""
        return self.weight.rows(ids)

    def project(self, x: Tensor) -> Tensor:
        """Multiply x [..., h] with the table as an output projection, [..., V] in float32."""
        return op.matmul(x, op.permute_dims(self.weight.matrix()), out_dtype="float32")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight over the last axis."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Apply it; the mean is taken in float32."""
        return op.rms_norm(x, self.weight.astype(x.dtype), axes=-1, epsilon=self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last axis."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Apply it; mean and variance are taken in float32."""
        dtype = "float32" if x.dtype == "bfloat16" else x.dtype  # TVM's operator knows no bfloat16
        parameters = self.weight.astype(dtype), self.bias.astype(dtype)
        return op.layer_norm(x.astype(dtype), x.shape[-1], *parameters, eps=self.eps).astype(x.dtype)


# Activations by transformers' names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": op.gelu,
    "gelu_pytorch_tanh": lambda x: op.gelu(x, approximate="tanh"),
    "relu": op.relu,
    "silu": op.silu,
}


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, up: Linear, down: Linear, activation: str) -> None:
        self.up = up
        self.down = down
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [b, s, h]."""
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate's rows first."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [b, s, h]."""
        gate, up = op.split(self.gate_up(x), 2, axis=-1)
        return self.down(op.silu(gate) * up)


class Attention(nn.Module):
    """Causal self-attention over the paged KV cache, which also applies the rotary embedding.

    ``qkv`` yields the heads of q, then k, then v, ``head_dim`` wide each; ``q_norm`` and ``k_norm`` normalise every
    head before it is rotated.
    """

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Attend from x [b, s, h] to everything ``cache`` holds of its sequences, in the layer of that number."""
        batch, seq, _ = x.shape
        qkv = op.reshape(self.qkv(x), (batch, seq, self.num_heads + 2 * self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = op.split(qkv, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
            qkv = op.concat([self.q_norm(q), self.k_norm(k), v], dim=2)
        y = cache.attention_with_fused_qkv(layer, qkv, self.num_heads, sm_scale=self.head_dim**-0.5)
        return self.out(op.reshape(y, (batch, seq, self.num_heads * self.head_dim)))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: nn.Module) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Apply the layer of that number to x [b, s, h]."""
        x = x + self.attention(self.attention_norm(x), cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class ParallelDecoderLayer(DecoderLayer):
    """x + attention(attention_norm(x)) + mlp(mlp_norm(x)): both read the layer's input."""

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Apply the layer of that number to x [b, s, h]."""
        return self.mlp(self.mlp_norm(x)) + self.attention(self.attention_norm(x), cache, layer) + x


class CausalLM(nn.Module):
    """Token embedding, decoder layers, final norm, head; parameters are packed in this order.

    Without a ``head``, the embedding's table is the output projection too (tied).
    """

    def __init__(
        self, embedding: Embedding, layers: Sequence[DecoderLayer], norm: nn.Module, head: Linear | None
    ) -> None:
        self.embedding = embedding
        self.layers = nn.ModuleList(list(layers))
        self.norm = norm
        self.head = head

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [s] int32 -> embeddings [s, h] in the compute dtype."""
        return self.embedding(ids)

    def hidden(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """Embeddings [b, s, h] -> normalised hidden states [b, s, h]."""
        for number, layer in enumerate(self.layers):
            x = layer(x, cache, number)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Normalised hidden states [b, s, h] -> logits [b, s, V] in float32."""
        y = self.embedding.project(x) if self.head is None else self.head(x)
        return y if y.dtype == "float32" else y.astype("float32")


class LayerFactory:
    """Makes layers whose parameters are those registered for the build, and notes every disagreement.

    ``registry`` is the content of params.json. A family asks for layers by checkpoint name and the shape that its
    config implies. After the model is composed, ``problems`` lists what the registry lacks or has otherwise, and
    ``names`` gives the stored name of each parameter made.
    """

    def __init__(self, registry: Register, compute_dtype: str) -> None:
        self.compute_dtype = compute_dtype
        self.problems: list[str] = []
        self.names: dict[nn.Parameter, str] = {}
        self._logical = {entry["name"]: entry for entry in registry["logical"]}
        self._stored = {entry["name"]: entry for entry in registry["params"]}

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool = False) -> Linear:
        """Make ``name``.weight [out, in] and, where asked, ``name``.bias [out]."""
        weight = self.matrix(f"{name}.weight", (out_features, in_features))
        return Linear(weight, self._vector(f"{name}.bias", out_features) if bias else None)

    def head(self, name: str, vocab_size: int, hidden_size: int) -> Linear:
        """Make the output projection ``name``.weight [V, h]; it yields float32."""
        return Linear(self.matrix(f"{name}.weight", (vocab_size, hidden_size)), out_dtype="float32")

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> Embedding:
        """Make the token table ``name``.weight [V, h]."""
        return Embedding(self.matrix(f"{name}.weight", (vocab_size, hidden_size)))

    def layer_norm(self, name: str, features: int, eps: float) -> LayerNorm:
        """Make the norm ``name``.weight and ``name``.bias [features]."""
        return LayerNorm(self._vector(f"{name}.weight", features), self._vector(f"{name}.bias", features), eps)

    def norm(self, name: str, features: int, eps: float) -> RMSNorm:
        """Make the root-mean-square norm ``name``.weight [features]."""
        return RMSNorm(self._vector(f"{name}.weight", features), eps)

    def vector(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        """Make the parameter ``name`` of that shape, which is no matrix, in the dtype it is stored in."""
        self._check(name, shape)
        return self._parameter(name, shape)

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """Make the matrix ``name`` [n, k] as it is stored."""
        logical = self._check(name, shape)
        rows, columns = shape
        layout = Layout(logical["layout"] if logical else "nk")
        if not logical or not logical["quantize"]:
            weight = self._parameter(name, layout.shape(rows, columns))
            return FloatMatrix(weight, rows, self.compute_dtype, layout)
        base = name.removesuffix("weight")
        row = logical["quantize"]
        bits, size = row["bits"], row["group_size"]
        groups = -(-columns // size) if size else 0
        if row["kind"] not in ("group", "mxfp4"):
            scale = self._parameter(f"{base}q_scale", (rows, groups) if size else (1,))
            return ScaledMatrix(self._parameter(f"{base}q_weight", shape), scale, size, self.compute_dtype)
        widths = {"q_weight": groups * (size // (32 // bits)), "q_scale": groups}
        if row["levels"]:
            levels = {"q_scale": level_words(groups, bits), "q_outer": 2 * level_blocks(groups, bits)}
            widths = {"q_weight": groups * size * bits // 32, **levels}
        elif row["minimum"]:
            widths |= {"q_min": groups}
        return GroupMatrix(
            **{part: self._parameter(f"{base}{part}", layout.shape(rows, width)) for part, width in widths.items()},
            shape=shape,
            bits=bits,
            group_size=size,
            compute_dtype=self.compute_dtype,
            layout=layout,
        )

    def _vector(self, name: str, features: int) -> nn.Parameter:
        self._check(name, (features,))
        return self._parameter(name, (features,))

    def _check(self, name: str, shape: tuple[int, ...]) -> Parameter | None:
        logical = self._logical.get(name)
        if logical and tuple(logical["shape"]) != shape:
            self.problems.append(f"{name}: registered as {list(logical['shape'])}, the model needs {list(shape)}")
        return logical

    def _parameter(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        stored = self._stored.get(name)
        if stored is None:
            self.problems.append(f"{name}: the model needs it, the register has no such parameter")
        elif tuple(stored["shape"]) != shape:
            self.problems.append(f"{name}: stored as {list(stored['shape'])}, the model needs {list(shape)}")
        parameter = nn.Parameter(shape, stored["dtype"] if stored else self.compute_dtype)
        self.names[parameter] = name
        return parameter
