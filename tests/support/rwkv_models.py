"""Tiny random RWKV-4 models: written by transformers, built through the stages, and transformers' own logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages import profiles
from stages.config_parse import ConfigParse
from stages.packing import assemble
from stages.param_register import ParamRegister
from stages.quantize import Quantize
from stages.runtime.folder import Entry
from stages.runtime.manifest import Manifest
from stages.runtime.session import Session
from stages.verification import live
from tests.support.compiled_qwen import Registered, build_graphs, compile_library
from tests.support.local_context import run_stage

CHUNK, BATCH = 24, 3
MODEL = {
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 5,
    "rescale_every": 2,
    "context_length": 48,
}


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """Write a random model with ``save_pretrained`` in two shards; every tensor matters, none is at its start value."""
    import torch
    import transformers

    random = np.random.default_rng(11)

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        leaf = name.rpartition(".")[2]
        if leaf.startswith("time_mix"):
            return random.random(shape)
        if leaf == "time_decay":
            return random.uniform(-4, 1, shape)
        if leaf == "bias":
            return 0.2 * random.standard_normal(shape)
        if len(shape) == 1:
            return (leaf == "weight") + 0.2 * random.standard_normal(shape)
        return random.standard_normal(shape) * (3 if name == "head.weight" else 1) / math.sqrt(shape[-1])

    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**{**MODEL, **changes}))
    state = {name: value(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(array).float() for name, array in state.items()})
    size = sum(4 * array.size for array in state.values())
    model.save_pretrained(folder, max_shard_size=int(0.6 * size))
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def edit_tensors(checkpoint: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Write a copy of ``checkpoint`` whose tensors went through ``change``."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    tensors: dict[str, np.ndarray] = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= load_file(path)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    return folder


@dataclass(frozen=True)
class Built:
    """A library with its weights, in one folder as a bundle has them, and the artifacts that describe it."""

    checkpoint: Path
    registered: Registered
    root: Path

    def session(self, sequences: int = 1) -> Session:
        metadata = json.loads((self.root / "metadata.json").read_text())
        files = {name: Entry(**entry) for name, entry in assemble.files(self.root).items()}
        described = Manifest(self.root, "tiny", "llvm", "x86_64", {}, {}, metadata["model"], [], files)
        return Session(described, sequences=sequences)


def parse(folder: Path, checkpoint: Path, scheme: str, target: str = "llvm") -> tuple[Registered, dict[str, Path]]:
    profiles.compiler()
    run_stage(ConfigParse(), folder / "config", {"checkpoint": str(checkpoint)})
    ports = {name: folder / "config" / out.path for name, out in ConfigParse.outputs.items()}
    choice = {"scheme": scheme, "target": target}
    run_stage(ParamRegister(), folder / "params", choice, {name: ports[name] for name in ("config", "tensors")})
    return Registered(ports["config"], folder / "params" / "params.json"), ports


def build(folder: Path, checkpoint: Path, scheme: str, *, library: Path | None = None, **options: Any) -> Built:
    """Run the stages up to compile and quantize; a ``library`` that is there already is taken in its place."""
    registered, ports = parse(folder, checkpoint, scheme)
    if library is None:
        graphs = build_graphs(folder, registered, "llvm", prefill_chunk=CHUNK, max_batch=BATCH, **options)
        library = compile_library(folder / "compile", graphs, registered, target="llvm").out
    inputs = {"params": registered.params, "tensors": ports["tensors"]}
    choice = {"scheme": scheme, "target": "llvm", "checkpoint": str(checkpoint)}
    root = run_stage(Quantize(), folder / "quantize", choice, inputs).out / "weights"
    for name in ("model.so", "metadata.json"):
        (root / name).write_bytes((library / name).read_bytes())
    return Built(checkpoint, registered, root)


def published_logits(checkpoint: Path, ids: Sequence[int]) -> np.ndarray:
    """Return the float32 logits [n, V] of transformers' model as it loads the checkpoint itself."""
    import transformers

    return _logits(transformers.AutoModelForCausalLM.from_pretrained(checkpoint).float(), ids)


def held_logits(built: Built, ids: Sequence[int]) -> np.ndarray:
    """Return the float32 logits [n, V] of transformers' model with the weights that are stored, dequantized, as
    verify computes them; and what it picks after a prompt is what those logits say.
    """
    half = len(ids) // 2
    request = live.LiveRequest(
        bundle=built.root,
        params=built.registered.params,
        config=built.registered.model,
        tokens=ids,
        arithmetic="float32",
        int8_cache=False,
        continued=[(ids[:half], ids[half:])],
        active_vocab_size=MODEL["vocab_size"],
    )
    computed = live.compute(request)
    logits: np.ndarray = computed["logits"]
    assert computed["picks_0"].tolist() == logits[half - 1 : -1].argmax(-1).tolist()
    assert 0 < computed["spread"] < 1e-3
    return logits


def _logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    import torch

    # Without a cache the state starts as an empty sum, not as transformers' cache, whose shape is wrong where the
    # attention is wider than the model.
    with torch.inference_mode():
        logits: np.ndarray = model.eval()(torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()
    return logits
