"""A tiny random Qwen built through the stages and run with TVM directly, and transformers' outputs on its weights."""

from __future__ import annotations

import atexit
import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stagegraph.stage import Instance
from stages import profiles
from stages.compile import Compile
from stages.config_parse import ConfigParse
from stages.graph_build import GraphBuild
from stages.models import load_family, transforms
from stages.param_register import ParamRegister
from stages.quantization import layouts
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.parameter import convert, restored
from stages.quantization.rows import Row
from tests.support.checkpoints import qwen_tensors, write_qwen
from tests.support.local_context import Elsewhere, LocalContext, run_stage

FUNCTIONS = ("embed", "prefill", "decode", "kv", "softmax")
MODEL = {"hidden": 64, "layers": 2, "heads": 2, "ff": 96, "ranks": 300}
ROWS = 512
SEED = 7


@dataclass(frozen=True)
class Registered:
    """A parsed and registered checkpoint: what graph-build reads."""

    model: Path
    params: Path


def register(folder: Path, scheme: str, target: str) -> Registered:
    profiles.compiler()
    checkpoint = write_qwen(folder / "checkpoint", **MODEL, rows=ROWS, dtype="float32", seed=SEED)
    run_stage(ConfigParse(), folder / "config", {"checkpoint": str(checkpoint)})
    ports = {name: folder / "config" / out.path for name, out in ConfigParse.outputs.items()}
    inputs = {name: ports[name] for name in ("config", "tensors")}
    run_stage(ParamRegister(), folder / "params", {"scheme": scheme, "target": target}, inputs)
    return Registered(ports["config"], folder / "params" / "params.json")


def build_graph(folder: Path, registered: Registered, target: str, function: str, **options: Any) -> LocalContext:
    inputs = {"config": registered.model, "params": registered.params}
    return run_stage(GraphBuild(), folder, {"target": target, "function": function, **options}, inputs)


def build_graphs(folder: Path, registered: Registered, target: str, **options: Any) -> dict[str, list[Instance]]:
    ports: dict[str, list[Instance]] = {"module": [], "graph": []}
    for function in FUNCTIONS:
        build_graph(folder / f"graph-{function}", registered, target, function, **options)
        for port, instances in ports.items():
            instances.append(Instance({"function": function}, folder / f"graph-{function}" / f"{port}.json"))
    return ports


@functools.cache
def kernels_made() -> Path:
    """Where the kernels are kept that tests have compiled, for all workers of a run: many models have equal ones."""
    if shared := os.environ.get("STAGEGRAPH_TEST_KERNELS"):
        return Path(shared)
    folder = tempfile.TemporaryDirectory(prefix="kernels-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def compile_library(
    folder: Path,
    ports: Mapping[str, Any],
    registered: Registered,
    *,
    memo: Path | None = None,
    elsewhere: Elsewhere | None = None,
    **options: Any,
) -> LocalContext:
    """Compile the graphs of ``ports``; kernels are taken from ``memo``, without one from those made before."""
    inputs = {**ports, "params": registered.params}
    return run_stage(Compile(), folder, options, inputs, memo or kernels_made(), elsewhere)


@dataclass(frozen=True)
class Weights:
    """The same random model twice: as the library stores it (packed order), and as float32 checkpoint tensors that
    mean exactly what is stored."""

    stored: list[np.ndarray]
    meant: dict[str, np.ndarray]


def weights(registered: Registered) -> Weights:
    registry = json.loads(registered.params.read_text())
    tensors = qwen_tensors(MODEL["hidden"], MODEL["layers"], MODEL["ff"], ROWS, SEED)
    stored, meant = [], {}
    for entry in registry["logical"]:
        array = transforms.apply(entry["transform"], [tensors[name] for name in entry["sources"]])
        if entry["quantize"]:
            row = Row(**entry["quantize"])
            packed = convert([array], row, shape=array.shape, dtype="", scales="max").stored
            each = zip(packed, row.element_bits, strict=True)
            stored += [layouts.arrange(entry["layout"], tensor, bits) for tensor, bits in each]
            array = restored(packed, row, array.shape[1])
        else:
            array = np.ascontiguousarray(array.astype(numpy_dtype(entry["dtype"])))
            stored.append(layouts.arrange(entry["layout"], array))
            array = array.astype(np.float32)
        parts = transforms.invert(entry["transform"], array, entry["source_shapes"])
        meant.update(zip(entry["sources"], parts, strict=True))
    return Weights(stored, meant)


def reference_logits(registered: Registered, meant: Mapping[str, np.ndarray], ids: Sequence[int]) -> np.ndarray:
    """Return transformers' float32 logits [len(ids), V] of the same model."""
    import torch
    import transformers

    model = json.loads(registered.model.read_text())
    family = load_family(model["family"])
    name, keywords, state = family.to_reference(family.config(**model["config"]), meant)
    config = transformers.AutoConfig.for_model("qwen2", **keywords)
    reference = getattr(transformers, name)(config).eval()
    reference.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in state.items()})
    with torch.no_grad():
        logits: np.ndarray = reference(torch.tensor([list(ids)])).logits[0].numpy()
    return logits


class Runner:
    """A library on the CPU with a KV cache for ``sequences`` sequences, numbered from 0."""

    def __init__(self, library: Path, stored: Sequence[np.ndarray], *, sequences: int = 1, tokens: int = 512) -> None:
        import tvm
        from tvm import relax

        self.tvm = tvm
        self.vm = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
        self.metadata = json.loads(self.vm["_metadata"]())
        self.params = [tvm.runtime.tensor(array) for array in stored]
        model = self.metadata["model"]
        self.sep_embed = model["sep_embed"]
        sizes = (sequences, tokens, model["prefill_chunk"], model["page_size"], 0)
        shape = tvm.runtime.ShapeTuple
        self.kv = self.vm["create_tir_paged_kv_cache"](*(shape([size]) for size in sizes))
        for sequence in range(sequences):
            self.call("add_sequence", sequence)

    def call(self, name: str, *arguments: Any) -> None:
        self.tvm.get_global_func(f"vm.builtin.kv_state_{name}")(self.kv, *arguments)

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        return self.vm["embed"](self.tvm.runtime.tensor(np.array(ids, "int32")), self.params).numpy()

    def forward(
        self, function: str, chunks: Mapping[int, Sequence[int]], shape: tuple[int, int], *more: Any
    ) -> np.ndarray:
        """Return float32 logits [rows, V] of ``function`` on the ids of each sequence, laid out as ``shape``."""
        ids = np.array([token for chunk in chunks.values() for token in chunk], "int32")
        states = self.embed(ids).reshape(*shape, -1) if self.sep_embed else ids.reshape(shape)
        tensors = [self.tvm.runtime.tensor(array) for array in (states, *more)]
        lengths = [len(chunk) for chunk in chunks.values()]
        self.call("begin_forward", self.tvm.runtime.ShapeTuple(list(chunks)), self.tvm.runtime.ShapeTuple(lengths))
        logits = self.vm[function](*tensors, self.kv, self.params)[0].numpy()
        self.call("end_forward")
        return logits.reshape(-1, logits.shape[-1])

    def prefill(self, ids: Sequence[int], sequence: int = 0) -> np.ndarray:
        return self.forward("prefill", {sequence: ids}, (1, len(ids)))[0]

    def decode(self, token: int, sequence: int = 0) -> np.ndarray:
        return self.forward("decode", {sequence: [token]}, (1, 1))[0]


def metadata_of(library: Path) -> dict[str, Any]:
    """Return what the library tells of itself."""
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    found: dict[str, Any] = json.loads(machine["_metadata"]())
    return found


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return max |difference| over max |expected|."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def in_bytes(x: np.ndarray, group: int) -> np.ndarray:
    """Return float32 ``x`` [.., k] as docs/abi.md has int8 activations, in float64: integers times a scale."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    peak = np.maximum(np.abs(groups).max(-1, keepdims=True), np.float32(1e-20))
    integers = np.rint(groups * (np.float32(127) / peak)).astype(np.float64)
    return (integers * (peak / np.float32(127))).reshape(x.shape)
