"""Tensors of safetensors files that are parts of a quantized one: GPTQ, AWQ, compressed-tensors, fp8, int8, nf4, MXFP4.

Told by the names of the parts and by ``quantization_config`` of config.json, whose other formats stay what they are and
are refused by name (:mod:`stages.checkpoint.quantized`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

from stages.checkpoint import strict_json
from stages.checkpoint.errors import ConfigError
from stages.checkpoint.safetensors import TensorInfo
from stages.checkpoint.strict_json import shown
from stages.problems import capped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from stages.documents.files import JsonObject
    from stages.documents.model import Packed

    Tensors = Mapping[str, tuple[str, TensorInfo]]
    Module = dict[str, tuple[str, TensorInfo]]  # part -> file and info

FLOATS = ("F32", "F16", "BF16")
NF4 = "weight.quant_state.bitsandbytes__nf4"
# Scales of activations and of the KV cache, which stay in float here.
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")
SIZES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
BLOCKS = "_blocks"  # how MXFP4's codes are called, after the name of their tensor
BESIDE = ("weight_shape", "qzeros", "weight_zero_point", "weight_format")  # parts that go with a weight, used or not
MAX_STATE = 4096  # bytes of bitsandbytes' JSON


class _UnfitError(ValueError):
    """Parts that do not make a tensor; the message says why."""


class Fold:
    """Groups the stored parts of quantized tensors (codes, scales, zeros) into one logical tensor each.

    ``tensors`` are name -> (file, info) of all that there are then; ``packed`` says how the quantized are made.
    """

    def __init__(self, found: Tensors, files: Mapping[str, Path], declared: JsonObject) -> None:
        self.tensors: dict[str, tuple[str, TensorInfo]] = dict(found)
        self.packed: dict[str, Packed] = {}
        self._files, self._declared = files, declared
        modules: dict[str, Module] = defaultdict(dict)
        for name, at in found.items():
            for marker in (".weight.", "."):  # bitsandbytes' parts are of the weight
                prefix, dot, part = name.rpartition(marker) if marker == "." else name.partition(marker)
                if dot and part:
                    modules[prefix][f"weight.{part}" if marker == ".weight." else part] = at
                    break
        problems = []
        for prefix, module in modules.items():
            try:
                self._fold(prefix, module)
            except _UnfitError as error:
                problems.append(f"{prefix}: {error}")
        if problems:
            raise ConfigError(*capped(problems))
        if self.packed:
            beside = [name for name in self.tensors if name.rpartition(".")[2] in OF_ACTIVATIONS]
            self.tensors = {name: at for name, at in self.tensors.items() if name not in beside}

    def _fold(self, prefix: str, module: Module) -> None:
        for part in [part for part in module if part.endswith(BLOCKS)]:
            stem = part.removesuffix(BLOCKS)
            if f"{stem}_scales" in module:
                self._put(prefix, stem, module, _mxfp4(module, stem), {part, f"{stem}_scales"})
        for marks, make in FORMS:
            if all(mark in module for mark in marks):
                made = make(self, module)
                if made is not None:
                    self._put(prefix, "weight", module, made, {*made[2].values(), *marks, *BESIDE})
                return

    def _put(self, prefix: str, part: str, module: Module, made: FoldedTensor, consumed: set[str]) -> None:
        """Let ``prefix.part`` be what is ``made`` of the ``consumed`` parts."""
        form, called, parts, shape, settings = made
        name, dtype = f"{prefix}.{part}", settings["dtype"]
        self.packed[name] = {
            "form": form,
            "called": called,
            "parts": {
                key: {
                    "name": f"{prefix}.{part}",
                    "dtype": module[part][1].dtype,
                    "shape": [*module[part][1].shape],
                    "file": module[part][0],
                }
                for key, part in parts.items()
            },
            "settings": {**settings, "shape": [*shape]},
        }
        for each in consumed & module.keys():
            del self.tensors[f"{prefix}.{each}"]
        first = next(iter(parts.values()))
        self.tensors[name] = module[first][0], TensorInfo(dtype, shape, module[first][1].offset)

    def setting(self, key: str, default: Any = None) -> Any:
        """Return a value of quantization_config."""
        value = self._declared.get(key)
        return default if value is None else value

    def read(self, at: tuple[str, TensorInfo]) -> bytes:
        """Return a small tensor's bytes."""
        file, info = at
        if info.nbytes > MAX_STATE:
            raise _UnfitError(f"{info.nbytes:,} bytes of settings; at most {MAX_STATE:,} are read")
        with self._files[file].open("rb") as opened:
            opened.seek(info.offset)
            return opened.read(info.nbytes)


FoldedTensor: TypeAlias = "tuple[str, str, dict[str, str], tuple[int, ...], JsonObject]"


def declared(files: Mapping[str, Path]) -> JsonObject:
    """Return quantization_config of the config.json among ``files``, {} where there is none to be read."""
    try:
        found = strict_json.read_object(files["config.json"], "config.json").get("quantization_config")
    except (KeyError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _expect(module: Module, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> TensorInfo:
    if part not in module:
        raise _UnfitError(f"{part} is missing")
    info = module[part][1]
    if info.dtype not in dtypes or (shape is not None and info.shape != shape):
        wanted = f"{' or '.join(dtypes)} {'' if shape is None else [*shape]}".strip()
        raise _UnfitError(f"{part} is {info.dtype} {[*info.shape]}; expected {wanted}")
    if 0 in info.shape:
        raise _UnfitError(f"{part} is {info.dtype} {[*info.shape]}, which holds nothing")
    return info


def _bits(fold: Fold, known: tuple[int, ...]) -> int:
    bits = fold.setting("bits", fold.setting("w_bit", 4))
    if bits not in known:
        raise _UnfitError(f"quantization_config says bits = {shown(bits)}; {', '.join(map(str, known))} are read")
    return int(bits)


def _gptq(fold: Fold, module: Module) -> FoldedTensor:
    bits = _bits(fold, (2, 3, 4, 8))
    scales = _expect(module, "scales", FLOATS)
    words = _expect(module, "qweight", ("I32",))
    if len(scales.shape) != 2 or len(words.shape) != 2 or words.shape[0] * 32 % bits:
        raise _UnfitError(f"qweight {[*words.shape]} and scales {[*scales.shape]} are no matrix of {bits} bits")
    (groups, out), inputs = scales.shape, words.shape[0] * 32 // bits
    _expect(module, "qweight", ("I32",), (inputs * bits // 32, out))
    parts = {"qweight": "qweight", "scales": "scales"}
    sym = fold.setting("sym") is True
    if not sym:
        _expect(module, "qzeros", ("I32",), (groups, -(-out * bits // 32)))
        parts["qzeros"] = "qzeros"
    if "g_idx" in module:
        _expect(module, "g_idx", ("I32",), (inputs,))
        parts["g_idx"] = "g_idx"
    form = fold.setting("checkpoint_format", fold.setting("format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        raise _UnfitError(f"quantization_config says checkpoint_format = {shown(form)}; gptq and gptq_v2 are read")
    settings = {"bits": bits, "sym": sym, "v2": form == "gptq_v2", "dtype": scales.dtype}
    return "gptq", f"GPTQ with {bits} bits", parts, (out, inputs), settings


def _awq(fold: Fold, module: Module) -> FoldedTensor:
    _bits(fold, (4,))
    form = str(fold.setting("version", fold.setting("format", "gemm"))).lower()
    if form != "gemm":
        raise _UnfitError(f"quantization_config says version = {shown(form)}; of AWQ, gemm is read")
    scales = _expect(module, "scales", FLOATS)
    words = _expect(module, "qweight", ("I32",))
    if len(scales.shape) != 2 or len(words.shape) != 2:
        raise _UnfitError(f"qweight {[*words.shape]} and scales {[*scales.shape]} are no matrix")
    (groups, out), inputs = scales.shape, words.shape[0]
    _expect(module, "qweight", ("I32",), (inputs, out // 8))
    _expect(module, "qzeros", ("I32",), (groups, out // 8))
    return "awq", "AWQ", {key: key for key in ("qweight", "qzeros", "scales")}, (out, inputs), {"dtype": scales.dtype}


def _packed(fold: Fold, module: Module) -> FoldedTensor:
    words = _expect(module, "weight_packed", ("I32",))
    scales = _expect(module, "weight_scale", FLOATS)
    _expect(module, "weight_shape", ("I64",), (2,))
    stated = fold.read(module["weight_shape"])
    out, inputs = (int.from_bytes(stated[at : at + 8], "little", signed=True) for at in (0, 8))
    possible = [bits for bits in range(1, 9) if inputs > 0 and words.shape == (out, -(-inputs * bits // 32))]
    wanted = _weights_of(fold, "num_bits")
    bits = next((bits for bits in possible if bits == wanted), possible[0] if len(possible) == 1 else 0)
    if not bits:
        raise _UnfitError(f"weight_packed {[*words.shape]} is no matrix [{out}, {inputs}] of {shown(wanted)} bits")
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    if scales.shape not in ((out, groups), (1,), (1, 1), (out,)) or groups > inputs:
        raise _UnfitError(f"weight_scale is {[*scales.shape]} for a matrix [{out}, {inputs}]")
    parts = {"weight_packed": "weight_packed", "weight_scale": "weight_scale"}
    if "weight_zero_point" in module:
        _expect(module, "weight_zero_point", ("I32",), (-(-out * bits // 32), groups))
        parts["weight_zero_point"] = "weight_zero_point"
    if "weight_g_idx" in module:
        _expect(module, "weight_g_idx", ("I32",), (inputs,))
        parts["weight_g_idx"] = "weight_g_idx"
    settings = {"bits": bits, "dtype": scales.dtype}
    return "compressed-tensors", f"compressed-tensors with {bits} bits", parts, (out, inputs), settings


def _weights_of(fold: Fold, key: str) -> Any:
    """Return what compressed-tensors' only group of modules says of its weights."""
    groups = fold.setting("config_groups", {})
    entries = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if groups else []
    values = [entry.get(key) for entry in entries if isinstance(entry, dict)]
    return values[0] if values and all(value == values[0] for value in values) else None


def _scaled(part: str, dtype: str | None = None) -> Callable[[Fold, Module], FoldedTensor | None]:
    """Return what makes a matrix of codes and scales; ``dtype``: of its values, that of the scales if None."""

    def make(fold: Fold, module: Module) -> FoldedTensor | None:
        weight = module["weight"][1]
        if weight.dtype not in ("I8", "F8_E4M3", "F8_E5M2"):
            return None
        scale = _expect(module, part, (*FLOATS, "F8_E8M0", "U8"))
        if len(weight.shape) != 2 or len(scale.shape) > 2:
            raise _UnfitError(f"weight is {[*weight.shape]} and {part} {[*scale.shape]}; expected matrices")
        grid = scale.shape if len(scale.shape) == 2 else (math.prod(scale.shape), 1)
        block = fold.setting("weight_block_size") or _weights_of(fold, "block_structure")
        even = [-(-size // max(count, 1)) for size, count in zip(weight.shape, grid, strict=True)]
        sizes = block if isinstance(block, list) and grid == _cells(weight.shape, block) else even
        if _cells(weight.shape, sizes) != grid:
            raise _UnfitError(
                f"{part} is {[*scale.shape]} for a weight {[*weight.shape]}: no scale for each row or block"
            )
        parts = {"weight": "weight", "scale": part}
        if "weight_zero_point" in module:
            _expect(module, "weight_zero_point", ("I8",), scale.shape)
            parts["weight_zero_point"] = "weight_zero_point"
        exponents = scale.dtype not in FLOATS
        values = dtype or ("BF16" if exponents else scale.dtype)
        settings = {"block": sizes, "exponents": exponents, "dtype": values}
        kind = "int8" if weight.dtype == "I8" else "fp8"
        return "scaled", f"{kind} with scales", parts, weight.shape, settings

    return make


def _llm_int8(fold: Fold, module: Module) -> FoldedTensor:
    weight = _expect(module, "weight", ("I8",))
    if len(weight.shape) != 2:
        raise _UnfitError(f"weight is {[*weight.shape]}; expected a matrix")
    _expect(module, "SCB", ("F32",), weight.shape[:1])
    if "weight_format" in module and any(fold.read(module["weight_format"])):
        raise _UnfitError("weight_format is not 0: its rows are reordered for some GPUs; save it again as rows")
    return "int8", "bitsandbytes int8", {"weight": "weight", "SCB": "SCB"}, weight.shape, {"dtype": "F32"}


def _mxfp4(module: Module, stem: str) -> FoldedTensor:
    """Matrices [experts, out, in], which transformers holds transposed."""
    codes, scales = f"{stem}{BLOCKS}", f"{stem}_scales"
    shape = _expect(module, codes, ("U8",)).shape
    if len(shape) != 4 or shape[3] != 16:
        raise _UnfitError(f"{codes} is {[*shape]}; expected experts, rows, blocks, and 16 bytes of a block")
    _expect(module, scales, ("U8",), shape[:3])
    whole = (shape[0], 32 * shape[2], shape[1])
    return "mxfp4", "MXFP4", {"blocks": codes, "scales": scales}, whole, {"dtype": "BF16"}


def _cells(shape: tuple[int, ...], block: Any) -> tuple[int, ...]:
    good = len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    return tuple(-(-size // side) for size, side in zip(shape, block, strict=True)) if good else ()


def _nf4(fold: Fold, module: Module) -> FoldedTensor:
    try:
        state = strict_json.parse(fold.read(module[NF4]))
        shape, block = tuple(state["shape"]), state["blocksize"]
        good = len(shape) == 2 and all(type(size) is int and 0 < size < 2**31 for size in (*shape, block))
        dtype = SIZES[f"torch.{str(state['dtype']).removeprefix('torch.')}"]
        nested = [state["nested_blocksize"], state["nested_offset"]] if "weight.nested_absmax" in module else [1, 0.0]
        good = good and type(nested[0]) is int and nested[0] > 0 and isinstance(nested[1], (int, float))
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise _UnfitError(f"{NF4} holds no settings of bitsandbytes")
    values = math.prod(shape)
    _expect(module, "weight", ("U8",), (-(-values // 2), 1))
    blocks = -(-values // block)
    parts = {"weight": "weight", "absmax": "weight.absmax", "quant_map": "weight.quant_map"}
    _expect(module, "weight.quant_map", ("F32",), (16,))
    if "weight.nested_absmax" in module:
        _expect(module, "weight.absmax", ("U8",), (blocks,))
        _expect(module, "weight.nested_quant_map", ("F32",), (256,))
        _expect(module, "weight.nested_absmax", ("F32",), (-(-blocks // nested[0]),))
        parts |= {"nested_absmax": "weight.nested_absmax", "nested_quant_map": "weight.nested_quant_map"}
    else:
        _expect(module, "weight.absmax", ("F32",), (blocks,))
    settings = {"blocksize": block, "nested_blocksize": nested[0], "nested_offset": nested[1], "dtype": dtype}
    return "nf4", "bitsandbytes nf4", parts, shape, settings


def _awq_or_gptq(fold: Fold, module: Module) -> FoldedTensor:
    return _gptq(fold, module) if fold.setting("quant_method") == "gptq" else _awq(fold, module)


# The parts that show a form, and what makes of a module's parts what is read; the first that fits.
FORMS: tuple[tuple[tuple[str, ...], Callable[[Fold, Module], FoldedTensor | None]], ...] = (
    (("qweight", "scales", "g_idx"), _gptq),
    (("qweight", "scales", "qzeros"), _awq_or_gptq),
    (("weight_packed", "weight_scale"), _packed),
    ((NF4, "weight"), _nf4),
    (("weight", "SCB"), _llm_int8),
    # transformers makes values of the model's dtype of it: float32, which holds products with bfloat16 scales exactly.
    (("weight", "weight_scale_inv"), _scaled("weight_scale_inv", "F32")),
    (("weight", "weight_scale"), _scaled("weight_scale")),
)
