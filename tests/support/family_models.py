"""Tiny checkpoints of every family, written by transformers itself, built through the stages, and their references."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from stages import profiles
from stages.bundle import Bundle
from stages.config_parse import ConfigParse
from stages.models import load_family
from stages.param_register import ParamRegister
from stages.quantize import Quantize
from stages.runtime import manifest, tensor_cache
from stages.runtime.session import Session
from stages.verification import weights
from stages.verification.rounding import rounded
from tests.support.checkpoints import write_json
from tests.support.compiled_qwen import Registered, build_graphs, compile_library
from tests.support.local_context import run_stage

CHUNK, BATCH = 64, 2
# Of transformers' modelling files, each beside one in chunks.
STEPPED = ("torch_recurrent_gated_delta_rule", "recurrent_kimi_delta_attention")
ODD_VOCAB = 515
SIZES = {
    "vocab_size": ODD_VOCAB, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 6, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def longrope(pairs: int) -> dict[str, Any]:
    short, long = ([1 + i / slope for i in range(pairs)] for slope in (8, 2))
    more = {"factor": 4.0, "short_factor": short, "long_factor": long}
    return {"rope_type": "longrope", "rope_theta": 1000.0, "original_max_position_embeddings": 32, **more}


NEOX = {**SIZES, "hidden_size": 160, "num_attention_heads": 2}  # heads of 80 channels


def theta(value: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": value, **more}


@dataclass(frozen=True)
class Case:
    """A model: transformers' prefix of its classes, its config, and what is built of it."""

    prefix: str
    config: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    context_window: int = 0


CASES = {
    "llama": Case("Llama", {
        **SIZES, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": LLAMA3,
    }),
    "llama-tied": Case(
        "Llama",
        {**SIZES, "num_key_value_heads": 3, "tie_word_embeddings": True, "rope_parameters": LINEAR},
        {"sep_embed": False},
    ),
    "qwen2": Case("Qwen2", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": YARN}),
    # one layer of all positions, two of a window
    "qwen2-window": Case("Qwen2", {
        **SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 20,
        "max_window_layers": 1, "rope_parameters": theta(1e4),
    }),
    "qwen3": Case("Qwen3", {**SIZES, "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": theta(1e6)}),
    "gpt_neox": Case("GPTNeoX", {
        **NEOX, "use_parallel_residual": True, "rope_parameters": theta(1e4, partial_rotary_factor=0.25),
    }),
    "redpajama": Case("GPTNeoX", {
        **NEOX, "use_parallel_residual": False, "hidden_act": "gelu_new", "max_position_embeddings": 64,
        "rope_parameters": {**DYNAMIC, "partial_rotary_factor": 1.0},
    }, context_window=128),
    "mistral": Case("Mistral", {**SIZES, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 20,
                                "rope_parameters": longrope(16)}),
    # heads of 24 channels, which TVM's kernels compute
    "mistral-24": Case("Mistral", {**SIZES, "num_key_value_heads": 2, "head_dim": 24, "sliding_window": 20,
                                   "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "mistral-full": Case("Mistral", {**SIZES, "num_key_value_heads": 2, "sliding_window": None,
                                     "rope_parameters": theta(1e6)}),
}  # fmt: skip


def write(folder: Path, case: Case, *, shards: int = 2, seed: int = 0) -> Path:
    """Write a random checkpoint whose logits spread over a few units, so that every weight and option matters."""
    import torch
    import transformers

    model = getattr(transformers, f"{case.prefix}ForCausalLM")(
        getattr(transformers, f"{case.prefix}Config")(**case.config)
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                gain = 3.0 if name in ("lm_head.weight", "embed_out.weight") else 1.6 if "attn" in name else 1.0
                parameter.normal_(0, gain / math.sqrt(parameter.shape[1]))
            else:
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    total = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=int(total / shards * 1.15))
    assert len(list(folder.glob("*.safetensors"))) == shards
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Write what stands for a tokenizer's directory: a bundle needs one, a session does not."""
    folder.mkdir(parents=True)
    info = {"schema": 1, "family": "none", "fingerprint": "", "active_vocab_size": vocab_size, "stop": [0, 2]}
    write_json(
        folder / "tokenizer_info.json", {**info, "bos": None, "pad": None, "prefix": [], "chat": {"format": "raw"}}
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_json(folder / name, {})
    return folder


@dataclass(frozen=True)
class Built:
    """One bundle, and what it was made of."""

    checkpoint: Path
    scheme: str
    config: Path
    params: Path
    bundle: Path

    def session(self, sequences: int = 1) -> Session:
        found = manifest.read(self.bundle)
        assert not manifest.check(found)
        return Session(found, sequences=sequences)

    @cached_property
    def held(self) -> dict[str, np.ndarray]:
        """The checkpoint's tensors, float32, with the values that the bundle stores."""
        registry, records = json.loads(self.params.read_text()), tensor_cache.records(manifest.read(self.bundle).folder)
        return {tensor.name: tensor.values() for tensor in weights.bundled_tensors(registry, records)}

    def reference(
        self,
        ids: Sequence[int],
        tensors: Mapping[str, np.ndarray] | None = None,
        arithmetic: str = "",
        *,
        double: bool = False,
    ) -> np.ndarray:
        """Return transformers' logits [n, V]: of the checkpoint as transformers reads it where nothing is quantized,
        else of its own model with the values that the bundle stores; with an ``arithmetic`` what linear layers read is
        disturbed as that rounds; with ``double`` all is computed in float64."""
        import torch
        import transformers

        # Torch's grouped products of experts know no float64.
        plain = {"experts_implementation": "eager"} if double else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32, **plain)
        if tensors is not None or self.scheme != "q0f32":
            described = json.loads(self.config.read_text())
            family = load_family(described["family"])
            _, _, state = family.to_reference(family.config(**described["config"]), tensors or self.held)
            held = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
            missing, beyond = model.load_state_dict(held, strict=False)
            # What a model makes of its config may lie in its checkpoint too, and is in no bundle.
            assert not beyond
            assert not {*missing} & {name for name, _ in model.named_parameters()}
        file = vars(sys.modules[type(model).__module__])
        # In chunks its gated delta rule errs by up to 2e-5 in float32; token by token, as it decodes, by a third.
        exact = {name.replace("recurrent", "chunk"): file[name] for name in file if name in STEPPED}
        how = rounded(model, arithmetic, {}) if arithmetic else in_float64(model) if double else nullcontext()
        with torch.no_grad(), mock.patch.dict(file, exact), how:
            logits = model.eval()(torch.tensor([list(ids)])).logits[0]
        found: np.ndarray = logits.numpy() if double else logits.float().numpy()
        return found


def in_float64(model: Any) -> Any:
    """Return the mode in which ``model``, made double, computes in float64 what its code says float32 of."""
    import torch

    model.double()

    class InFloat64(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: Any, _types: Any, arguments: Any = (), keywords: Mapping[str, Any] | None = None
        ) -> Any:
            if function is torch.Tensor.float:
                function = torch.Tensor.double
            more = {name: self.of(value) for name, value in (keywords or {}).items()}
            return function(*map(self.of, arguments), **more)

        def of(self, value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

    return InFloat64()


def parse_and_register(
    folder: Path, checkpoint: Path, scheme: str, target: str = "llvm", context_window: int = 0, frontend: str = "auto"
) -> dict[str, Path]:
    """Run config-parse and param-register; return their artifacts by port."""
    source = {"checkpoint": str(checkpoint), "context_window": context_window, "frontend": frontend}
    run_stage(ConfigParse(), folder / "config", source)
    ports = {name: folder / "config" / out.path for name, out in ConfigParse.outputs.items()}
    inputs = {name: ports[name] for name in ("config", "tensors")}
    run_stage(ParamRegister(), folder / "params", {"scheme": scheme, "target": target}, inputs)
    return {**ports, "params": folder / "params" / "params.json"}


def build(
    folder: Path,
    case: Case,
    scheme: str,
    *,
    checkpoint: Path | None = None,
    frontend: str = "auto",
    activations: str = "float",
    **options: Any,
) -> Built:
    """Run every stage but the tokenizer's and verify."""
    profiles.compiler()
    checkpoint = checkpoint or write(folder / "checkpoint", case)
    ports = parse_and_register(folder, checkpoint, scheme, context_window=case.context_window, frontend=frontend)
    choice = {"scheme": scheme, "target": "llvm", "checkpoint": str(checkpoint)}
    run_stage(Quantize(), folder / "quantize", choice, {name: ports[name] for name in ("params", "tensors")})
    registered = Registered(ports["config"], ports["params"])
    sizes = {"prefill_chunk": CHUNK, "max_batch": BATCH, **case.options, **options}
    graphs = build_graphs(folder, registered, "llvm", **sizes)
    compile_library(folder / "compile", graphs, registered, target="llvm", activations=activations)
    inputs = {
        "library": folder / "compile" / "model.so",
        "metadata": folder / "compile" / "metadata.json",
        "weights": folder / "quantize" / "weights",
        "tokenizer": write_tokenizer(folder / "tokenizer", case.config["vocab_size"]),
        "config": ports["config"],
        "generation": ports["generation"],
    }
    run_stage(Bundle(), folder / "bundle", {"target": "llvm", "name": "tiny"}, inputs)
    return Built(checkpoint, scheme, ports["config"], ports["params"], folder / "bundle" / "bundle")


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return max |difference| over max |expected|, infinite where something is not finite."""
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / np.abs(expected).max())
