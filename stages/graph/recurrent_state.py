"""create_rnn_state: the state of a recurrent model, with the kernels that read and write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.frontend import nn

from stages.graph.export import Build, export_plain
from stages.kernels import wkv
from stages.models.rwkv_layers import RecurrentState, StateTensor


class State(nn.Module):
    """The exported function; see docs/abi.md for its convention."""

    def __init__(self, build: Build) -> None:
        model: Any = build.model()[0]
        self.num_layers: int = model.state_layers
        self.tensors: Sequence[StateTensor] = model.states

    def create_rnn_state(self, max_batch_size: tirx.Var, max_history: tirx.Var) -> RecurrentState:
        """Return an empty state for so many sequences, which keeps the last ``max_history`` steps of each."""
        builder = rx.BlockBuilder.current()
        getters, setters, initial = [], [], []
        known: dict[tuple[int, str], tuple[Any, Any]] = {}  # tensors of one form have the same kernels
        for number, tensor in enumerate(self.tensors):
            form = tensor.width, tensor.dtype
            if form not in known:
                getter = builder.add_func(wkv.state_get(*form), f"state_get_{number}")
                known[form] = getter, builder.add_func(wkv.state_set(*form), f"state_set_{number}")
            getters.append(known[form][0])
            setters.append(known[form][1])
            value = rx.const(tensor.initial, tensor.dtype)
            initial.append(builder.emit(rx.op.full((tensor.width,), value, tensor.dtype)))
        call = rx.call_pure_packed(
            "vm.builtin.rnn_state_create",
            rx.prim_value(self.num_layers),
            max_batch_size,
            max_history,
            rx.Tuple(getters),
            rx.Tuple(setters),
            rx.Tuple(initial),
            ty_args=rx.AnyType(),
        )
        return RecurrentState(_expr=call, _name="state")


def export(build: Build) -> tvm.IRModule:
    """Return the module of ``create_rnn_state`` and the kernels it hands to the runtime."""
    return export_plain(build, State(build), {"create_rnn_state": {"max_batch_size": int, "max_history": int}})
