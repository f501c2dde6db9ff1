"""embed: token ids to embeddings."""

from __future__ import annotations

import tvm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from stages.graph.export import Build, export_model, tensor
from stages.models.layers import CausalLM


class Embed(nn.Module):
    """The exported function; see docs/abi.md for its convention."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [seq_len, h] of ``input_ids`` int32 [seq_len]."""
        return self.model.embed(input_ids)


def export(build: Build) -> tvm.IRModule:
    """Return the module of ``embed``."""
    return export_model(build, Embed, {"embed": {"input_ids": tensor(["seq_len"], "int32")}})
