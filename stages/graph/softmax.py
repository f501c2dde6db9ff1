"""softmax_with_temperature: logits to the probabilities that sampling draws from."""

from __future__ import annotations

import tvm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from stages.graph.export import Build, export_plain, tensor


class Softmax(nn.Module):
    """The exported function; see docs/abi.md for its convention."""

    def softmax_with_temperature(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """Return softmax(logits [b, 1, V] / temperature [b]) over V; temperatures are above zero."""
        return op.softmax(logits / op.reshape(temperature, (temperature.shape[0], 1, 1)), axis=-1)


def export(build: Build) -> tvm.IRModule:
    """Return the module of ``softmax_with_temperature``."""
    logits = tensor(["batch_size", 1, build.config.vocab_size], "float32")
    temperature = tensor(["batch_size"], "float32")
    spec = {"softmax_with_temperature": {"logits": logits, "temperature": temperature}}
    return export_plain(build, Softmax(), spec)
