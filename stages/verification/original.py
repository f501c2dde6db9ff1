"""The original model: transformers on the checkpoint's own files, in float32, whose probabilities a bundle is held to.

transformers reads config.json and the weights itself and with its own rules, so that nothing this project has misread
is wrong on both sides. Weights stay where they are, mapped from the checkpoint's files: each module gets its own in
float32 while it computes, so that a few of the largest matrices are in memory at a time and never the model. All tokens
go through a module before the next one is looked at.

A family that transformers has no class of (the first Qwen) is run by the class that its family names, on our reading of
config.json.
"""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from stages.checkpoint.headers import read_headers
from stages.models import load_family, naming

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stages.memo import Memo
    from stages.verification.apart import Progress

KIND = "original"  # of part: what one checkpoint says of one set of probes, shared by all schemes and targets
TOP = 1024  # of the likeliest tokens of a place are kept by themselves, the others as one sum
ROWS = 128  # whose logits are in memory at a time
# ids uint32 [n, TOP] and log_probs float32 [n, TOP], the likeliest first; chosen float32 [n]: the log probability of
# the token that stands there; what computes it in words; modules by name, and the largest magnitude that each reads or
# gives on the probes, float32.
ARRAYS = (
    *("original_ids", "original_log_probs", "original_chosen", "original_origin"),
    *("original_modules", "original_largest"),
)


@dataclass(frozen=True)
class Request:
    """What to compute: the probabilities of what follows each token but the last of each of ``pieces``, token ids.

    The first ``skipped`` places of each piece are left out: they are those of what goes before every text.
    ``root`` is the checkpoint's folder, ``files`` are its weights by name, ``config`` is where config-parse's is.
    """

    root: Path
    files: Mapping[str, Path]
    config: Path
    pieces: Sequence[Sequence[int]]
    skipped: int


def compute(request: Request, progress: Progress) -> dict[str, np.ndarray]:
    """Return :data:`ARRAYS`, the rows of all pieces one after the other."""
    import torch

    mapped, model, origin = load(request)
    with torch.inference_mode():
        longest = max(map(len, request.pieces))
        padded = torch.tensor([[*piece, *[0] * (longest - len(piece))] for piece in request.pieces])
        valid = torch.tensor([[at < len(piece) for at in range(longest)] for piece in request.pieces])
        largest: dict[str, float] = {}
        with _watched(model, valid, largest), weights_in_float32(model, mapped, progress):
            found = [
                _likeliest(logits, torch.tensor(following)) for logits, following in _logits(model, padded, request)
            ]
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    ranges = np.array(list(largest)), np.array(list(largest.values()), np.float32)
    return dict(zip(ARRAYS, [*columns, np.array(origin), *ranges], strict=True))


def known(memo: Memo, document: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Return what was computed before of the same ``document``, for whatever scheme or target."""
    part = memo.recall(KIND, document)
    if part is None:
        return None
    with np.load(part.path) as found:
        return dict(found)


def keep(memo: Memo, document: Mapping[str, Any], found: Mapping[str, np.ndarray], folder: Path) -> None:
    """Keep what was computed; ``folder`` is where a file may be made on the way."""
    file = folder / "original.npz"
    np.savez(file, **dict(found))  # type: ignore[arg-type]
    memo.remember(KIND, document, file)
    file.unlink()


def document(request: Request, checkpoint: str) -> dict[str, Any]:
    """Return everything that an answer depends on beside the code; ``checkpoint`` is the digest of its files."""
    probes = json.dumps([request.pieces, request.skipped], separators=(",", ":"))
    return {
        "checkpoint": checkpoint,
        "config": blake3(Path(request.config).read_bytes()).hexdigest(),
        "probes": blake3(probes.encode()).hexdigest(),
        "tools": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }


class Mapped:
    """The tensors of safetensors files as torch tensors that lie in the files themselves."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        import torch

        names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
        paths = {name: Path(path) for name, path in files.items()}
        found = read_headers(paths).tensors
        self._maps = {}
        for shard in sorted({shard for shard, _ in found.values()}):
            with paths[shard].open("rb") as file:
                # Private and writable: torch wants memory that may be written, and nobody writes.
                self._maps[shard] = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
        self.tensors: dict[str, Any] = {
            name: torch.frombuffer(
                self._maps[shard], dtype=names[info.dtype], count=math.prod(info.shape), offset=info.offset
            ).reshape(info.shape)
            for name, (shard, info) in found.items()
            if info.dtype in names and 0 not in info.shape
        }

    def release(self) -> None:
        """Take the pages that were read out of this process's memory; the system keeps them as long as it likes."""
        for each in self._maps.values():
            each.madvise(mmap.MADV_DONTNEED)


def load(request: Request) -> tuple[Mapped, Any, str]:
    """Return the checkpoint's tensors, transformers' model whose parameters they are, and what it is in words."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    mapped = Mapped(request.files)
    versions = f"transformers {transformers.__version__} and torch {torch.__version__}"
    config = _own_config(request.root)
    stored: Counter[Any] = Counter()
    for tensor in mapped.tensors.values():
        stored[tensor.dtype] += tensor.numel()
    most = stored.most_common(1)[0][0]
    if config is not None:
        cls: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = cls.from_pretrained(
            None, config=config, state_dict=dict(mapped.tensors), dtype=most, attn_implementation=_attention(cls)
        )
        how = f"{cls.__name__} of {versions} in float32 on the checkpoint's own files"
    else:
        model, cls = _by_family(request, mapped)
        how = f"{cls.__name__} of {versions} in float32 on the checkpoint's weights, by this project's reading of them"
    for name, parameter in model.named_parameters():
        # What is stored in more digits than most of the checkpoint was rounded when it was taken up.
        own = mapped.tensors.get(name)
        if own is not None and own.shape == parameter.shape and own.dtype != parameter.dtype:
            parameter.data = own
    return mapped, model.eval(), how


def _own_config(root: Path) -> Any:
    """Return the configuration as transformers reads it, None where it has no class for such a model."""
    import transformers

    name = json.loads((Path(root) / "config.json").read_bytes()).get("model_type")
    if name not in transformers.CONFIG_MAPPING:
        return None
    config = transformers.AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "rescale_every"):
        # RWKV halves its weights in place, and doubles what it makes of them, against overflows of float16.
        config.rescale_every = 0
    return config if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else None


def _attention(cls: Any) -> str:
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


def _by_family(request: Request, mapped: Mapped) -> tuple[Any, Any]:
    import torch
    import transformers

    described = json.loads(Path(request.config).read_text("utf-8"))
    family = load_family(described["family"])
    config = family.config(**described["config"])
    names = naming.resolve(family, config, mapped.tensors.keys())
    tensors = {name: mapped.tensors[names.stored(name)] for name in naming.wanted(family, config)}
    name, keywords, state = family.to_reference(config, tensors)
    cls = getattr(transformers, name)
    with parameters_without_memory():
        model = cls(cls.config_class(**keywords, attn_implementation=_attention(cls)))
    model.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()}, strict=True, assign=True)
    model.tie_weights()
    return model, cls


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Let modules be made with parameters on the meta device; buffers, which no checkpoint holds, stay real."""
    import torch

    module_class: Any = torch.nn.Module
    register = module_class.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, None if parameter is None else torch.nn.Parameter(parameter.to("meta")))

    module_class.register_parameter = on_meta
    try:
        yield
    finally:
        module_class.register_parameter = register


@contextmanager
def _watched(model: Any, valid: Any, largest: dict[str, float]) -> Iterator[None]:
    """Keep the largest magnitude that each module with parameters reads or gives where ``valid`` bool [b, s] is."""
    import torch

    def note(name: str) -> Any:
        def after(_module: Any, inputs: Any, output: Any) -> None:
            for value in (*inputs, output):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    here = value[valid] if value.shape[:2] == valid.shape else value
                    largest[name] = max(largest.get(name, 0.0), float(here.abs().max()))

        return after

    named = [(name, module) for name, module in model.named_modules() if _owns(module)]
    hooks = [module.register_forward_hook(note(name)) for name, module in named]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _owns(module: Any) -> bool:
    return next(module.parameters(recurse=False), None) is not None


@contextmanager
def weights_in_float32(model: Any, mapped: Mapped, progress: Progress = lambda *_: None) -> Iterator[None]:
    """Give each module its own parameters in float32 while it computes, and no longer."""
    import torch

    owners = [module for module in model.modules() if _owns(module)]
    done = 0

    def before(module: Any, _inputs: Any) -> None:
        module.stored = [parameter.data for parameter in module.parameters(recurse=False)]
        for parameter in module.parameters(recurse=False):
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()

    def after(module: Any, _inputs: Any, _outputs: Any) -> None:
        nonlocal done
        for parameter, stored in zip(module.parameters(recurse=False), module.stored, strict=True):
            parameter.data = stored
        del module.stored
        mapped.release()
        if done < len(owners):
            done += 1
            progress(done, len(owners), "modules of the original")

    hooks = [module.register_forward_pre_hook(before) for module in owners]
    hooks += [module.register_forward_hook(after) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _logits(model: Any, padded: Any, request: Request) -> Iterator[tuple[Any, Sequence[int]]]:
    """Yield logits float32 [n, V] of some places at a time, and the ids that stand after them.

    The body reads everything at once; what makes logits of its result, the head and whatever the model does with its
    output, is transformers' own forward with the body's result put in.
    """
    import torch

    prefix = model.base_model_prefix
    body = getattr(model, prefix)
    outputs = body(padded, use_cache=False)
    states = outputs.last_hidden_state.float()

    class Given(torch.nn.Module):
        """Stands where the body was and returns what it was given."""

        states: Any

        def forward(self, *_arguments: Any, **_keywords: Any) -> Any:
            return type(outputs)(**{**outputs, "last_hidden_state": self.states})

    given = Given()
    setattr(model, prefix, given)
    for number, piece in enumerate(request.pieces):
        for start in range(request.skipped, len(piece) - 1, ROWS):
            end = min(start + ROWS, len(piece) - 1)
            given.states = states[number : number + 1, start:end]
            yield (
                model(padded[number : number + 1, start:end], use_cache=False).logits[0].float(),
                piece[start + 1 : end + 1],
            )


def _likeliest(logits: Any, following: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the :data:`TOP` likeliest ids of each row, their log probabilities, and those of ``following``."""
    log_probs = logits.log_softmax(-1)
    top = log_probs.topk(min(TOP, logits.shape[-1]), dim=-1)
    chosen = log_probs.gather(-1, following[:, None])[:, 0]
    return top.indices.numpy().astype(np.uint32), top.values.numpy(), chosen.numpy()
