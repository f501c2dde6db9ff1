"""The quantize stage on whole checkpoints: what is stored, what is reported, memory, and disks that are too small."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagegraph.stage import Source, SourceFiles, StageError
from stagegraph.store.memo import Memo, PartCode
from stages.checkpoint.tensors import Weights
from stages.config_parse import ConfigParse
from stages.conversion import model
from stages.param_register import ParamRegister
from stages.quantization import compiled as native
from stages.quantization import layouts
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.parameter import restored
from stages.quantization.rows import Row
from stages.quantization.schemes import SCHEMES
from stages.quantize import Quantize
from tests.support.checkpoints import (
    qwen_config,
    qwen_tensors,
    write_json,
    write_qwen,
    write_raw_safetensors,
    write_safetensors,
)
from tests.support.local_context import Elsewhere, LocalContext, run_stage


def register(checkpoint: Path, work: Path, scheme: str, target: str = "llvm") -> dict[str, Path]:
    run_stage(ConfigParse(), work / "parsed", {"checkpoint": str(checkpoint)})
    inputs = {"config": work / "parsed/model.json", "tensors": work / "parsed/tensors.json"}
    run_stage(ParamRegister(), work / "registered", {"scheme": scheme, "target": target}, inputs)
    return {"params": work / "registered/params.json", "tensors": work / "parsed/tensors.json"}


def quantize(
    checkpoint: Path,
    out: Path,
    scheme: str,
    inputs: dict[str, Path],
    memo: Path | None = None,
    elsewhere: Elsewhere | None = None,
    **options: Any,
) -> LocalContext:
    params = {"checkpoint": str(checkpoint), "scheme": scheme, "target": "llvm", **options}
    return run_stage(Quantize(), out, params, inputs, memo, elsewhere)


def convert(checkpoint: Path, work: Path, scheme: str) -> LocalContext:
    return quantize(checkpoint, work / scheme, scheme, register(checkpoint, work, scheme))


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Read a tensor cache by its documented fields."""
    tensors = {}
    for shard in json.loads((folder / "tensor-cache.json").read_text())["records"]:
        data = (folder / shard["dataPath"]).read_bytes()
        assert len(data) == shard["nbytes"]
        for record in shard["records"]:
            dtype = numpy_dtype(record["dtype"])
            array = np.frombuffer(data, dtype, record["nbytes"] // dtype.itemsize, record["byteOffset"])
            tensors[record["name"]] = array.reshape(record["shape"])
    return tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_stored_weights_are_the_checkpoints(tmp_path: Path, scheme, dtype):
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1, dtype=dtype)
    ctx = convert(checkpoint, tmp_path, scheme)
    weights = stored(tmp_path / scheme / "weights")
    register = json.loads((tmp_path / "registered/params.json").read_text())
    described = [(entry["name"], entry["dtype"], entry["shape"]) for entry in register["params"]]
    assert [(name, str(array.dtype), [*array.shape]) for name, array in weights.items()] == described

    source = qwen_tensors(hidden=64, layers=1, ff=96, rows=512, seed=0)
    w1, w2 = (source.pop(f"transformer.h.0.mlp.{name}.weight") for name in ("w1", "w2"))
    source["transformer.h.0.mlp.gate_up_proj.weight"] = np.concatenate([w2, w1])
    report = {line["name"]: line for line in json.loads((tmp_path / scheme / "report.json").read_text())["tensors"]}
    assert report.keys() == source.keys()
    layout = {entry["name"]: entry["layout"] for entry in register["logical"]}
    rows = {entry["name"]: entry["quantize"] for entry in register["logical"]}
    for name, expected in source.items():
        stem = name.removesuffix("weight")
        row = Row(**rows[name]) if rows[name] else None
        parts = dict(zip((f"{stem}{part}" for part in row.parts), row.element_bits, strict=True)) if row else {name: ()}
        for part, bits in parts.items():
            weights[part] = layouts.restore(layout[name], weights[part], len(expected), bits)
        if row:
            found = restored([weights[f"{stem}{part}"] for part in row.parts], row, expected.shape[1])
            searched = SCHEMES[scheme].scales == "mse"  # may cut off the largest value
            four = 1 / 4 if row.kind == "mxfp4" else 1 - 31 / 50 * 8 / 7 if searched else 1 / 13
            three = 4 / 7 if searched else 1 / 5.9
            eight = 1 / 100 if row.kind == "group" else 1 / 15
            coarse = {2: 4 / 3, 3: three, 4: four, 5: 1 / 15, 6: 1 / 20, 8: eight}
            assert np.abs(found - expected).max() < np.abs(expected).max() * coarse[row.bits]
            error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
            assert report[name]["rmse"] == pytest.approx(error, rel=0.05)
        else:
            coarsest = min((dtype, SCHEMES[scheme].storage_dtype), key=["bfloat16", "float16", "float32"].index)
            limit = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 0}[coarsest]
            assert np.abs(weights[name].astype(np.float32) - expected).max() <= limit * np.abs(expected).max()
            assert report[name]["rmse"] <= (2**-8 if SCHEMES[scheme].storage_dtype == "bfloat16" else 2**-11)
    errors = [float(line.split("|")[3]) for line in ctx.views["errors"].splitlines()[2:]]
    assert errors == sorted(errors, reverse=True)


def test_bytes_do_not_depend_on_the_run_or_the_sharding(tmp_path: Path):
    checkpoint = write_qwen(tmp_path / "checkpoint", dtype="float32")
    convert(checkpoint, tmp_path / "a", "q4f16_1")
    tensors = qwen_tensors(hidden=64, layers=2, ff=96, rows=512, seed=0)
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    write_safetensors(checkpoint / "model.safetensors", dict(reversed(tensors.items())), "float32")
    convert(checkpoint, tmp_path / "b", "q4f16_1")
    names = sorted(path.relative_to(tmp_path / "a/q4f16_1") for path in (tmp_path / "a/q4f16_1").rglob("*.*"))
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "a/q4f16_1" / name).read_bytes() == (tmp_path / "b/q4f16_1" / name).read_bytes()


def test_values_that_are_not_finite_name_their_tensor(tmp_path: Path):
    tensors = qwen_tensors(hidden=64, layers=2, ff=96, rows=512, seed=0)
    tensors["transformer.h.1.mlp.w1.weight"][7, 5] = np.nan
    checkpoint = write_qwen(tmp_path / "checkpoint")
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    write_safetensors(checkpoint / "model.safetensors", tensors, "float32")
    with pytest.raises(StageError) as caught:
        convert(checkpoint, tmp_path, "q4f16_1")
    assert str(caught.value) == (
        "model.safetensors: tensor transformer.h.1.mlp.w1.weight (of parameter "
        "transformer.h.1.mlp.gate_up_proj.weight): the value at [7, 5] is nan"
    )
    assert not (tmp_path / "q4f16_1/weights").exists()


def test_the_libraries_that_compute_are_in_the_key():
    params = Quantize.Params(checkpoint="x", scheme="q0f32", target="llvm")
    assert Quantize().tools(params) == {"numpy": np.__version__, "ml-dtypes": ml_dtypes.__version__}


def test_scheme_and_register_must_agree(tmp_path: Path):
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1)
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    with pytest.raises(StageError, match="registered for q4f16_1 on llvm, quantize is asked for q0f32 on llvm"):
        quantize(checkpoint, tmp_path / "out", "q0f32", inputs)


def test_a_checkpoint_that_changed_after_config_parse_is_noticed(tmp_path: Path):
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1)
    inputs = register(checkpoint, tmp_path, "q0f32")
    write_qwen(checkpoint, layers=1, dtype="float32")
    with pytest.raises(StageError, match=r"transformer.wte.weight is not the BF16 \[512, 64\] that config-parse saw"):
        quantize(checkpoint, tmp_path / "out", "q0f32", inputs)


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1)
    inputs = register(checkpoint, tmp_path, "q0f32")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(StageError, match="the weights take 402,944 bytes as q0f32, the disk has 1,000 bytes free"):
        quantize(checkpoint, tmp_path / "out", "q0f32", inputs)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fills_up_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1)
    inputs = register(checkpoint, tmp_path, "q0f32")
    write, written = model._write, []

    def write_until_full(file: Any, tensor: np.ndarray) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(tensor)
        write(file, tensor)

    monkeypatch.setattr(model, "_write", write_until_full)
    with pytest.raises(StageError, match=r"the disk is full after \d[\d,]* of 201,472 bytes of weights were read"):
        quantize(checkpoint, tmp_path / "out", "q0f32", inputs)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_small_file_system_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1)
    inputs = register(checkpoint, tmp_path, "q0f32")
    out = tmp_path / "out"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(out)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        # what fills it is somebody else, after the check
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
        with pytest.raises(StageError, match="the disk is full after"):
            quantize(checkpoint, out, "q0f32", inputs)
        assert list(out.iterdir()) == []
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path):
    few, many = (peak_memory(layers, threads=1) for layers in (2, 12))
    assert many < few + 12, f"{few:.0f} MB for 2 layers, {many:.0f} MB for 12 layers of 26 MB each"
    largest = 2 * 2816 * 1024 * 4 / 1e6  # the fused gate and up projection in float32
    assert max(many, peak_memory(12, threads=4)) < 3 * largest + 300


def bits_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "weights").iterdir())}


def reused(ctx: LocalContext) -> tuple[int, int]:
    assert ctx.memo
    counts = ctx.memo.counts["tensor"]
    return counts["made"], counts["reused"]


@pytest.mark.parametrize("scales", ["max", "mse"])
def test_only_changed_tensors_are_made_again(tmp_path: Path, scales: str):
    """One of two layers is tuned: the fused parameter of the changed tensor is made, everything else is reused."""
    checkpoint, memo = write_qwen(tmp_path / "checkpoint"), tmp_path / "memo"
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    first = quantize(checkpoint, tmp_path / "first", "q4f16_1", inputs, memo, scales=scales)
    assert reused(first) == (17, 0)
    again = quantize(checkpoint, tmp_path / "again", "q4f16_1", inputs, memo, scales=scales)
    assert reused(again) == (0, 17)
    assert "digests" not in again.memo.counts or not again.memo.counts["digests"]["made"]
    tensors = qwen_tensors(hidden=64, layers=2, ff=96, rows=512, seed=0)
    tensors["transformer.h.1.mlp.w1.weight"] *= 1.5
    tensors["transformer.h.1.ln_2.weight"] *= 1.5
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    write_safetensors(checkpoint / "model.safetensors", tensors, "bfloat16")
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    tuned = quantize(checkpoint, tmp_path / "tuned", "q4f16_1", inputs, memo, scales=scales)
    assert reused(tuned) == (2, 15)
    fresh = quantize(checkpoint, tmp_path / "fresh", "q4f16_1", inputs, scales=scales)
    assert bits_of(tuned.out) == bits_of(fresh.out)
    assert (tuned.out / "report.json").read_bytes() == (fresh.out / "report.json").read_bytes()
    inputs = register(checkpoint, tmp_path, "q4f32_1")
    assert reused(quantize(checkpoint, tmp_path / "other", "q4f32_1", inputs, memo)) == (17, 0)


def test_parts_that_others_made_become_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In pieces, of which each sees its own files alone; nothing is left to convert then."""
    checkpoint = write_qwen(tmp_path / "checkpoint", hidden=256, ff=256, layers=3)
    inputs = register(checkpoint, tmp_path, "q4f32_1")
    alone = quantize(checkpoint, tmp_path / "alone", "q4f32_1", inputs)
    converted = []
    convert = model.convert
    monkeypatch.setattr(model, "convert", lambda *given, **how: converted.append(how) or convert(*given, **how))
    others = Elsewhere(Quantize(), tmp_path / "others")
    together = quantize(checkpoint, tmp_path / "together", "q4f32_1", inputs, batch=1, elsewhere=others)
    assert len(list((tmp_path / "others").iterdir())) > 2
    assert len(converted) == len(others.made) == reused(alone)[0]
    assert reused(together) == reused(alone)
    assert bits_of(together.out) == bits_of(alone.out)
    assert (together.out / "report.json").read_bytes() == (alone.out / "report.json").read_bytes()


def test_sources_are_read_once_unless_they_may_be_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint, memo = write_qwen(tmp_path / "checkpoint"), tmp_path / "memo"
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    names = json.loads(inputs["tensors"].read_bytes())["tensors"].keys()
    monkeypatch.setattr(model, "KERNELS_FROM", 0)
    read, blocks = [], Weights.blocks
    monkeypatch.setattr(Weights, "blocks", lambda self, name: read.append(name) or blocks(self, name))
    quantize(checkpoint, tmp_path / "first", "q4f16_1", inputs, memo, threads=1)
    assert Counter(read) == Counter(names)
    assert {"transformer.wte.weight", "lm_head.weight"} == set(read[:2])  # the largest before all
    read.clear()
    quantize(checkpoint, tmp_path / "again", "q4f16_1", inputs, memo)
    assert not read
    tensors = qwen_tensors(hidden=64, layers=2, ff=96, rows=512, seed=0)
    tensors["transformer.h.1.ln_2.weight"] *= 1.5
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    write_safetensors(checkpoint / "model.safetensors", tensors, "bfloat16")
    quantize(checkpoint, tmp_path / "tuned", "q4f16_1", register(checkpoint, tmp_path, "q4f16_1"), memo)
    assert Counter(read) == Counter([*names, "transformer.h.1.ln_2.weight"])


def test_what_an_interrupted_run_did_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint, memo = write_qwen(tmp_path / "checkpoint"), tmp_path / "memo"
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    write, written = model._write, []

    def write_some(file: Any, tensor: np.ndarray) -> None:
        if len(written) >= 15:
            raise KeyboardInterrupt
        written.append(tensor)
        write(file, tensor)

    monkeypatch.setattr(model, "_write", write_some)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, tmp_path / "first", "q4f16_1", inputs, memo, threads=1)
    monkeypatch.setattr(model, "_write", write)
    made, found = reused(quantize(checkpoint, tmp_path / "second", "q4f16_1", inputs, memo))
    assert found >= 8
    assert made + found == 17
    assert bits_of(tmp_path / "second") == bits_of(quantize(checkpoint, tmp_path / "fresh", "q4f16_1", inputs).out)


def test_a_file_that_changes_meanwhile_leaves_nothing_to_reuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint, memo = write_qwen(tmp_path / "checkpoint"), tmp_path / "memo"
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    convert, calls = model.convert, []

    def convert_what_changes(*arguments: Any, **how: Any) -> Any:
        calls.append(how)
        if len(calls) == 5:
            for path in checkpoint.glob("*.safetensors"):
                path.write_bytes(path.read_bytes())
        return convert(*arguments, **how)

    monkeypatch.setattr(model, "convert", convert_what_changes)
    with pytest.raises(StageError, match="the file was changed while it was read; run again"):
        quantize(checkpoint, tmp_path / "first", "q4f16_1", inputs, memo, threads=1)
    made, found = reused(quantize(checkpoint, tmp_path / "second", "q4f16_1", inputs, memo))
    assert (made, found) == (13, 4)


def test_parts_are_kept_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = write_qwen(tmp_path / "checkpoint")
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    kept, remember_all = [], LocalContext.remember_all

    def noted(context: LocalContext, kind: str, parts: Any) -> None:
        kept.append(len(parts))
        remember_all(context, kind, parts)

    monkeypatch.setattr(LocalContext, "remember_all", noted)
    quantize(checkpoint, tmp_path / "together", "q4f16_1", inputs, tmp_path / "memo")
    assert kept == [17]
    kept.clear()
    monkeypatch.setattr(model, "KEPT_EVERY", 2**16)
    quantize(checkpoint, tmp_path / "on-the-way", "q4f16_1", inputs, tmp_path / "other")
    assert sum(kept) == 17
    assert len(kept) > 3


def test_the_time_left_is_told_once_enough_is_done_to_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = write_qwen(tmp_path / "checkpoint")
    inputs, told = register(checkpoint, tmp_path, "q4f16_1"), []
    monkeypatch.setattr(LocalContext, "progress", lambda _, done, total, unit, note: told.append((done / total, note)))
    monkeypatch.setattr(model, "TELLING", 0.5)  # the first tensor of so small a checkpoint is a quarter of it
    quantize(checkpoint, tmp_path / "out", "q4f16_1", inputs, threads=1)
    assert min(told)[0] < model.TELLING < max(told)[0]
    assert [" s left" in note for _, note in told] == [part >= model.TELLING for part, _ in told]


@pytest.mark.parametrize("scheme", ["q3f16_1", "q4f16_1"])
def test_compiled_kernels_store_what_numpy_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str):
    checkpoint, memo = write_qwen(tmp_path / "checkpoint"), tmp_path / "memo"
    inputs = register(checkpoint, tmp_path, scheme)
    plain = quantize(checkpoint, tmp_path / "plain", scheme, inputs)
    monkeypatch.setattr(model, "KERNELS_FROM", 0)
    monkeypatch.setattr("stages.checkpoint.tensors.BLOCK", 8192)  # so that a matrix comes in several
    compiled = quantize(checkpoint, tmp_path / "compiled", scheme, inputs, memo, threads=2)
    assert compiled.memo.counts["kernels"]["made"] == 1
    assert bits_of(compiled.out) == bits_of(plain.out)
    assert (compiled.out / "report.json").read_bytes() == (plain.out / "report.json").read_bytes()


def test_kernels_that_cannot_be_compiled_are_said_and_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1)
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    monkeypatch.setattr(model, "KERNELS_FROM", 0)

    def fail(*_: object) -> None:
        raise native.KernelError("no such processor")

    monkeypatch.setattr(native, "build", fail)
    ctx = quantize(checkpoint, tmp_path / "out", "q4f16_1", inputs)
    assert ctx.warnings == ["kernels could not be compiled, NumPy did the work: no such processor"]


def test_a_search_for_scales_needs_groups():
    with pytest.raises(StageError, match="groups of integers, and e4m3_f16 has none"):
        Quantize().resolve(Quantize.Params(checkpoint="x", scheme="e4m3_f16", target="llvm", scales="mse"))


def peak_memory(layers: int, threads: int) -> float:
    """Return the peak resident memory in MB of a process that quantizes a sparse checkpoint of ``layers`` layers."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        checkpoint = work / "checkpoint"
        checkpoint.mkdir()
        write_json(
            checkpoint / "config.json",
            qwen_config(hidden=1024, layers=layers, heads=8, ff=2816, rows=1024, dtype="bfloat16"),
        )
        write_sparse_shard(checkpoint / "model.safetensors", layers)
        inputs = register(checkpoint, work, "q4f16_1")
        program = (
            "import sys\nfrom pathlib import Path\nfrom tests.stages.test_quantize import quantize_alone\n"
            "quantize_alone(*map(Path, sys.argv[1:4]), int(sys.argv[4]))\nprint(Path('/proc/self/status').read_text())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(work), str(inputs["params"]), str(inputs["tensors"]), str(threads)],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert found
    return int(found[1]) / 1e3


def quantize_alone(work: Path, params: Path, tensors: Path, threads: int) -> None:
    """Run the stage as an engine does: without reading the checkpoint for its digest in this process."""
    out, file = work / "out", "model.safetensors"
    out.mkdir()
    source = SourceFiles(work / "checkpoint", {file: work / "checkpoint" / file}, {})
    stage_params = Quantize.Params(Source(work / "checkpoint"), "q4f16_1", "llvm", threads=threads)
    memo = Memo.open(work, dict.fromkeys(Quantize.parts, PartCode("of this test", {})), fresh=False)
    inputs = {"params": params, "tensors": tensors}
    Quantize().run(LocalContext(stage_params, out, inputs, {"checkpoint": source}, memo))


def write_sparse_shard(path: Path, layers: int) -> None:
    """Write a header for a model of zeros whose payload is a hole in the file."""
    shapes: dict[str, Any] = {"transformer.wte.weight": [1024, 1024], "lm_head.weight": [1024, 1024]}
    shapes["transformer.ln_f.weight"] = [1024]
    for i in range(layers):
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in {
            "ln_1.weight": [1024], "ln_2.weight": [1024],
            "attn.c_attn.weight": [3072, 1024], "attn.c_attn.bias": [3072],
            "attn.c_proj.weight": [1024, 1024], "mlp.w1.weight": [2816, 1024], "mlp.w2.weight": [2816, 1024],
            "mlp.c_proj.weight": [1024, 2816],
        }.items()}  # fmt: skip
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    write_raw_safetensors(path, json.dumps(header).encode(), b"")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + end)
