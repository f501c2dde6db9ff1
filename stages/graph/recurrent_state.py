"""create_rnn_state: the state of a recurrent model, with the kernels that read and write it."""

from __future__ import annotations

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.frontend import nn

from stages.graph.export import Build, export_plain
from stages.kernels import wkv
from stages.models.rwkv_layers import RecurrentState


class State(nn.Module):
    """The exported function; see docs/abi.md for its convention."""

    def __init__(self, build: Build) -> None:
        self.num_layers: int = build.config.num_layers
        model, _ = build.model()
        self.tensors = model.states

    def create_rnn_state(self, max_batch_size: tirx.Var, max_history: tirx.Var) -> RecurrentState:
        """Return an empty state for so many sequences, which keeps the last ``max_history`` steps of each."""
        builder = rx.BlockBuilder.current()
        getters, setters, initial = [], [], []
        for number, tensor in enumerate(self.tensors):
            getters.append(builder.add_func(wkv.state_get(tensor.width, tensor.dtype), f"state_get_{number}"))
            setters.append(builder.add_func(wkv.state_set(tensor.width, tensor.dtype), f"state_set_{number}"))
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
