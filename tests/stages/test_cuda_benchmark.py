"""benchmarks/cuda.py, packed and carried away: a Python with NumPy and nothing else, here with a bundle for the CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import bundles
from tests.support.archives import unpack

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda.py"
PACK = SCRIPT.with_name("cuda_pack.py")
RUNTIME_MEGABYTES = 30


@pytest.fixture(scope="module")
def packed(recorded, tmp_path_factory):
    """A tar of a bundle with its reference, unpacked beside a folder of NumPy alone; and what packing printed."""
    folder = tmp_path_factory.mktemp("carried")
    command = [sys.executable, str(PACK), str(recorded.bundle), str(folder / "out.tar")]
    command += ["--reference", str(recorded.checkpoint / "reference")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    unpack(folder / "out.tar", folder / "there")
    numpy = Path(np.__file__).parent
    (folder / "python").mkdir()
    for part in (numpy, numpy.with_name("numpy.libs")):
        if part.exists():
            (folder / "python" / part.name).symlink_to(part)
    return folder, said


def carried(folder, *arguments):
    """Run Python as it is on the other machine, in the unpacked folder."""
    environment = {"PYTHONPATH": str(folder / "python"), "PATH": "/usr/bin:/bin", "TVM_NUM_THREADS": "2"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(
        command, cwd=folder / "there", env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_what_is_carried_is_small_and_nothing_else_is_at_hand(packed):
    folder, said = packed
    size = float(re.search(r"TVM's runtime ([\d.]+) MB", said)[1])
    assert 5 < size < RUNTIME_MEGABYTES
    assert sorted(path.name for path in (folder / "there").iterdir()) == ["bundle", "cuda.py", "site"]
    for name in ("stagegraph", "stages", "tvm", "transformers", "tokenizers"):
        assert "ModuleNotFoundError" in carried(folder, "-c", f"import {name}").stderr
    assert not (folder / "there" / "site" / "tvm" / "lib" / "libtvm_compiler.so").exists()


@pytest.mark.slow
def test_a_carried_bundle_is_right_and_measured(packed):
    folder, _ = packed
    done = carried(folder, "cuda.py", "bundle", "--device", "cpu", "--contexts", "16", "64", "--json", "out.json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((folder / "there" / "out.json").read_text())
    assert found["parity"]["right"]
    assert found["parity"]["worst"] < 1e-4
    assert found["parity"]["same_token"] == found["parity"]["steps"] == 65
    assert [row["context"] for row in found["rows"]] == [16, 64]
    assert all(value > 0 for row in found["rows"] for value in row.values())
    assert "65 steps" in done.stdout
    assert "stored weights" in done.stdout


@pytest.mark.slow
def test_wrong_weights_are_called_wrong(packed):
    folder, _ = packed
    shard = folder / "there" / "bundle" / "params_shard_0.bin"
    original = shard.read_bytes()
    values = np.frombuffer(original, "float32")
    shard.write_bytes((values * np.float32(1.1)).tobytes())
    try:
        done = carried(folder, "cuda.py", "bundle", "--device", "cpu", "--contexts", "16")
    finally:
        shard.write_bytes(original)
    assert done.returncode == 1
    assert ": WRONG" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["q4f16_1", "e4m3_f16", "q0bf16"])
def test_weights_are_drawn_where_none_were_carried(scheme, tmp_path):
    built = bundles.build(tmp_path / "built", scheme)
    library = tmp_path / "library"
    library.mkdir()
    (built.bundle / "model.so").rename(library / "model.so")
    command = [sys.executable, str(SCRIPT), str(library), "--device", "cpu", "--contexts", "16"]
    done = subprocess.run([*command, "--json", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert "random weights" in done.stdout
    found = json.loads((tmp_path / "out").read_text())
    assert "parity" not in found
    assert found["rows"][0]["decode_tokens_per_second"] > 0


def test_what_cannot_be_run_is_said_in_one_line(packed, tmp_path):
    folder, _ = packed
    for arguments, said in (
        (["elsewhere"], "elsewhere has no model.so"),
        (["bundle", "--device", "cpu", "--contexts", "100000"], "no context fits"),
    ):
        done = carried(folder, "cuda.py", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr
    if not Path("/dev/nvidiactl").exists():
        done = carried(folder, "cuda.py", "bundle")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "CUDA" in done.stderr
    command = [sys.executable, str(PACK), str(tmp_path), str(tmp_path / "x.tar")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "x.tar").exists()) == (2, False)
