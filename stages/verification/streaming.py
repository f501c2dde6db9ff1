"""Runs a model of transformers whose weights stay in the checkpoint's files, so that little memory is used.

The files are mapped, and transformers takes the mapped tensors for its parameters, whatever their dtype. Each module
gets its own in float32 while it computes, and no longer, so that a few of the largest matrices are in memory at a time.
"""

from __future__ import annotations

import json
import math
import mmap
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from stages import models
from stages.checkpoint.gguf.folder import files_of
from stages.checkpoint.headers import read_headers
from stages.checkpoint.tensors import Weights, as_dtype
from stages.models import naming
from stages.tracing import hollow
from stages.verification import gguf_original, lending
from stages.verification.apart import LiveError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from stages.checkpoint.headers import TensorTable
    from stages.verification.apart import Progress

TorchTensors: TypeAlias = "Mapping[str, Any]"  # by name; torch's types are not known where it is not installed


class Mapped:
    """The tensors of safetensors files as torch tensors that lie in the files themselves."""

    def __init__(self, paths: Mapping[str, Path], found: TensorTable) -> None:
        import torch

        names = {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E5M2": torch.float8_e5m2,
        }
        self._maps = {}
        for shard in sorted({shard for shard, _ in found.values()}):
            with paths[shard].open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tensors: TorchTensors = {
            name: _lying_in(self._maps[shard], names[info.dtype], info.shape, info.offset)
            for name, (shard, info) in found.items()
            if info.dtype in names and 0 not in info.shape
        }

    def release(self) -> None:
        """Take the pages that were read out of this process's memory; the system keeps them as long as it likes."""
        for each in self._maps.values():
            each.madvise(mmap.MADV_DONTNEED)


class Written:
    """Tensors that are made one by one, as torch tensors that lie in one file without a name in ``scratch``."""

    def __init__(self, made: Iterable[tuple[str, np.ndarray]], scratch: Path) -> None:
        import torch

        places: dict[str, tuple[int, tuple[int, ...], Any]] = {}
        with tempfile.TemporaryFile(dir=scratch) as file:
            for name, values in made:
                file.seek(-file.tell() % 64, 1)
                dtype = getattr(torch, values.dtype.name)
                places[name] = file.tell(), values.shape, dtype
                file.write(values.data)
            file.flush()
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tensors: TorchTensors = {
            name: _lying_in(self._map, dtype, shape, offset) for name, (offset, shape, dtype) in places.items()
        }

    def release(self) -> None:
        """Take the pages that were read out of this process's memory."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _lying_in(mapped: mmap.mmap, dtype: Any, shape: tuple[int, ...], offset: int) -> Any:
    """Return the torch tensor at ``offset`` bytes of a map that may only be read.

    A map that may be written would count as memory that the process asks for, though nobody writes: the kernel refuses
    a file larger than the machine's memory so. torch warns that such a tensor must not be written.
    """
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=offset).reshape(shape)


def load(root: Path, files: Mapping[str, Path], described: Path, scratch: Path) -> tuple[Any, Any, str]:
    """Return the checkpoint's tensors, transformers' model with these as parameters, and a description of the model.

    ``root`` is the checkpoint's folder, ``files`` are its weights by name, ``described`` is where config-parse's config
    is, for a model that transformers cannot read by itself. What is packed is written to ``scratch`` as float32.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = f"transformers {transformers.__version__} and torch {torch.__version__}"
    config, whole = _own_config(root), files_of(files)
    paths = {name: Path(path) for name, path in files.items()}
    headers = read_headers(paths)
    if whole:
        mapped: Any = Written(gguf_original.tensors([paths[name] for name in whole], config), scratch)
        read = f"weights, dequantized by gguf {version('gguf')}"
    elif headers.packed:
        weights = Weights(paths, headers.table())
        mapped = Written(((name, as_dtype(weights[name], np.dtype(np.float32))) for name in headers.tensors), scratch)
        read = f"weights, dequantized from {', '.join(sorted({each['called'] for each in headers.packed.values()}))}"
    else:
        mapped, read = Mapped(paths, headers.tensors), "own files"
    if config is not None:
        model, named = _from_files(config, described, mapped)
        how = f"{type(model).__name__} of {versions} in float32 on the checkpoint's {read}{named}"
    else:
        model = _by_family(described, mapped)
        how = f"{type(model).__name__} of {versions} in float32 on the checkpoint's weights, by this project's reading"
    return mapped, model.eval(), how


def _from_files(config: Any, described: Path, mapped: Any) -> tuple[Any, str]:
    """Return the model that transformers makes of the files, and what had to be said to it, if anything.

    Names that wrappers have lengthened (torch.compile, DDP) are not known to transformers, which would draw such
    weights at random: they are given by the names that param-register found them to be.
    """
    model, missing = _loaded(config, mapped.tensors)
    if not missing:
        return model, ""
    model, missing = _loaded(config, _named(described, mapped)[2])
    if missing:
        raise LiveError(f"transformers' {type(model).__name__} finds no weights for {', '.join(missing[:3])}")
    return model, ", by the names that this project reads there"


def _loaded(config: Any, tensors: TorchTensors) -> tuple[Any, list[str]]:
    """Return transformers' model of these tensors, and the names of parameters that it found nothing for."""
    import torch
    import transformers

    # float8 is no dtype to compute in, and float64 none that anybody loads a model in.
    taken_up_as = {torch.float64: torch.float32, torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16}
    stored: Counter[Any] = Counter()
    for tensor in tensors.values():
        stored[taken_up_as.get(tensor.dtype, tensor.dtype)] += tensor.numel()
    cls: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, found = cls.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=stored.most_common(1)[0][0],
        attn_implementation=_attention(cls),
        output_loading_info=True,
    )
    for name, parameter in model.named_parameters():
        # What is stored in another dtype than most of the checkpoint was copied, and perhaps rounded, on the way.
        own = tensors.get(name)
        if own is not None and own.shape == parameter.shape and own.dtype != parameter.dtype:
            parameter.data = own
    return model, sorted(found["missing_keys"])


def _named(described: Path, mapped: Any) -> tuple[Any, Any, TorchTensors]:
    """Return family and config as this project reads them, and the checkpoint's tensors by the model's names."""
    family, config = models.described(json.loads(Path(described).read_text("utf-8")))
    names = naming.resolve(family, config, mapped.tensors.keys())
    return family, config, {name: mapped.tensors[names.stored(name)] for name in naming.wanted(family, config)}


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
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # left over from another form of the checkpoint: these weights are plain
    return config if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else None


def _attention(cls: Any) -> str:
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


def _by_family(described: Path, mapped: Any) -> Any:
    """Return the model by the class that the family names, on our reading of config.json."""
    import torch
    import transformers

    family, config, tensors = _named(described, mapped)
    name, keywords, state = family.to_reference(config, tensors)
    cls = getattr(transformers, name)
    with hollow.parameters_without_memory():
        model = cls(cls.config_class(**keywords, attn_implementation=_attention(cls)))
    model.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()}, strict=True, assign=True)
    model.tie_weights()
    return model


@contextmanager
def weights_in_float32(model: Any, mapped: Any, progress: Progress = lambda *_: None) -> Iterator[None]:
    """Give each module its own parameters in float32 while it computes, and no longer."""

    def values(_name: str, parameter: Any) -> Any:
        return parameter.data.float()

    def tell(done: int, total: int) -> None:
        progress(done, total, "modules of the original")

    with lending.lent(model, values, mapped.release, tell):
        yield
