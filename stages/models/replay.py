"""A traced model as a module of TVM: its graphs, replayed operator by operator on the parameters of a build."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax as rx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from stages.models.arithmetic import Remembered, Values, emitted
from stages.models.family import Param
from stages.models.layers import LayerFactory
from stages.models.matrices import take
from stages.models.operators import OPERATORS
from stages.models.recurrence import states_of
from stages.models.rwkv_layers import RecurrentState
from stages.problems import ProblemsError

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


MATRICES = ("linear", "embedding", "head", "router")


class OperatorError(ProblemsError):
    """A traced graph asks an operator for what it does not compute."""


class PackedParameter(nn.Module):
    """One parameter, so that the module packs all of them in the order of a list."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Traced(nn.Module):
    """What :class:`stages.models.layers.CausalLM` is to the exported functions, of a traced config. ``states`` are what
    its layers keep of a sequence beside the KV cache, in order, as if of one layer.
    """

    state_layers = 1

    def __init__(self, config: Any, params: Sequence[Param], make: LayerFactory) -> None:
        self.config = config
        self.compute_dtype = make.compute_dtype
        self.states = states_of(config.parts["body"]["nodes"])
        self.weights = nn.ModuleList(
            [
                PackedParameter(make.matrix(each.name, (each.shape[0], each.shape[1])))
                if each.kind in MATRICES
                else PackedParameter(make.vector(each.name, each.shape))
                for each in params
            ]
        )
        self.numbers = {each.name: number for number, each in enumerate(params)}
        if config.tied:
            self.numbers[config.tie[0]] = self.numbers[config.tie[1]]

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [s] int32 -> embeddings [s, h] in the compute dtype."""
        return self._run("embed", [ids], ids.shape[0])

    def hidden(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """Embeddings [1, s, h] -> normalised hidden states [1, s, h]."""
        return self._body(x, cache, None)

    def hidden_kept(
        self, x: Tensor, cache: PagedKVCache, state: RecurrentState, ends: Tensor
    ) -> tuple[Tensor, RecurrentState]:
        """Embeddings [1, s, h] -> normalised hidden states [1, s, h], and the state after them; a sequence ends at each
        of the rows ``ends`` int32 [b].
        """
        remembered = Remembered(state, self.states, ends)
        return self._body(x, cache, remembered), remembered.state

    def _body(self, x: Tensor, cache: PagedKVCache | None, remembered: Remembered | None) -> Tensor:
        tokens = x.shape[1]
        positions = op.reshape(cache.get_query_positions(tokens), (1, tokens)) if cache is not None else None
        return self._run("body", [x, positions], tokens, cache, remembered)

    def logits(self, x: Tensor) -> Tensor:
        """Normalised hidden states [1, s, h] -> logits [1, s, V] in float32."""
        return self._run("head", [x], x.shape[1]).astype("float32")

    def _run(
        self,
        part: str,
        inputs: Sequence[Tensor | None],
        tokens: Any,
        cache: PagedKVCache | None = None,
        remembered: Remembered | None = None,
    ) -> Tensor:
        graph = self.config.parts[part]
        values: list[Any] = [*inputs]
        context = Values(self.compute_dtype, cache, self.config.attention, states=remembered)

        kinds: dict[str, Callable[[Any], Any]] = {
            "value": values.__getitem__,
            "parameter": lambda name: self.weights[self.numbers[name]].value,
            "constant": lambda number: _constant(self.config.constants[number]),
            "number": float,
            "tokens": lambda times: times * tokens,
        }

        def meant(value: Any) -> Any:
            if isinstance(value, list):
                return [meant(each) for each in value]
            if not isinstance(value, Mapping):
                return value
            ((kind, which),) = value.items()
            return kinds[kind](which)

        for name, arguments in graph["nodes"]:
            try:
                values.append(OPERATORS[name](context, **{key: meant(value) for key, value in arguments.items()}))
            except NotImplementedError as error:
                raise OperatorError(
                    f"{self.config.architecture}: node {len(values)} of its {part}, operator '{name}': {error}, which "
                    "has no kernel here; the model is not supported"
                ) from None
        return values[graph["output"]]


class Recurrent(Traced):
    """What :class:`stages.models.rwkv_layers.RecurrentLM` is to the exported functions, without attention too."""

    def hidden(  # type: ignore[override]  # of another kind of state
        self, x: Tensor, state: RecurrentState, ends: Tensor
    ) -> tuple[Tensor, RecurrentState]:
        """Embeddings [r, h] -> normalised hidden states [b, h] of the rows ``ends``, and the state after all rows."""
        remembered = Remembered(state, self.states, ends)
        found = self._body(op.reshape(x, (1, *x.shape)), None, remembered)
        return op.reshape(take(found, ends, axis=1), (ends.shape[0], found.shape[-1])), remembered.state

    def logits(self, x: Tensor) -> Tensor:
        """Normalised hidden states [b, h] -> logits [b, V] in float32."""
        found = super().logits(op.reshape(x, (1, *x.shape)))
        return op.reshape(found, found.shape[1:])


def _constant(entry: JsonObject) -> Tensor:
    array = np.frombuffer(base64.b85decode(entry["data"]), entry["dtype"]).reshape(entry["shape"])
    if array.dtype == np.int64:
        array = array.astype(np.int32)
    return emitted(rx.const(array), "constant")
