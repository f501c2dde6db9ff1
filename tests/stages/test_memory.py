"""The table of memory that compile renders, against what the C library has handed out while a session runs.

mallinfo2 counts every byte in use, whether it was touched or not. What the table leaves out sets the tolerances:
a header of each tensor, the rounding of TVM's pool to pages, int32 positions of a chunk, each thread's tiles.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from stages.codegen import views
from stages.runtime import state
from tests.support import family_models, rwkv_models

THREADS = 2
CONTEXT, CHUNK = 2048, 1024  # large enough for what is planned to stand out from what is not
MEASURE = """
import ctypes, json, os, sys
from pathlib import Path
from stages.packing import assemble
from stages.runtime import folder, manifest
from stages.runtime.session import Session

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
found = {}

def note(name, make):
    info, pages = libc.mallinfo2(), int(Path("/proc/self/statm").read_text().split()[1])
    made = make()
    after = libc.mallinfo2()
    found[name] = after.uordblks + after.hblkhd - info.uordblks - info.hblkhd
    found[name + " resident"] = (int(Path("/proc/self/statm").read_text().split()[1]) - pages) * 4096
    return made

class Measured(Session):
    def _load_params(self):
        return note("weights", super()._load_params)

    def _create_state(self, *sizes):
        return note("cache", lambda: super(Measured, self)._create_state(*sizes))

root = Path(sys.argv[1])
if (root / "bundle.json").is_file():
    described = manifest.read(root)
else:
    model = json.loads((root / "metadata.json").read_text())["model"]
    files = {name: folder.Entry(**entry) for name, entry in assemble.files(root).items()}
    described = manifest.Manifest(root, "tiny", "llvm", "x86_64", {}, {}, model, [], files)
session = Measured(described, sequences=int(sys.argv[2]))
sequence, ids = session.add(), list(range(3, 403))
chunk = (ids * 10)[: session.prefill_chunk]
note("results", lambda: session.prefill(sequence, chunk))
print(json.dumps(found))
"""


@pytest.mark.parametrize(("name", "sequences"), [("llama", 1), pytest.param("gpt_neox", 2, marks=pytest.mark.slow)])
def test_the_memory_that_compile_promises_is_what_a_session_takes(tmp_path, name, sequences):
    case = family_models.CASES[name]
    config = {**case.config, "max_position_embeddings": CONTEXT}
    built = family_models.build(tmp_path, dataclasses.replace(case, config=config), "q4f32_1", prefill_chunk=CHUNK)
    metadata = json.loads((tmp_path / "compile" / "metadata.json").read_text())
    lines = [line.strip("| ").split(" | ") for line in views.memory(metadata).splitlines()[2:]]
    table = {what: int(size.replace(",", "")) for what, size in lines}
    command = [sys.executable, "-c", MEASURE, str(built.bundle), str(sequences)]
    env = {**os.environ, "TVM_NUM_THREADS": str(THREADS)}
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)

    assert 0 <= found["weights"] - table["weights"] <= 0.01 * table["weights"] + 512 * len(metadata["params"])

    tokens = sequences * table[f"KV cache, one sequence of {CONTEXT} tokens"]
    planned = tokens + table[f"KV cache, workspace for chunks of {CHUNK} tokens"]
    assert 0 <= found["cache"] - 2 * views.CACHE_TABLES - planned <= 0.03 * planned
    assert found["cache resident"] < 0.01 * views.CACHE_TABLES, "the tables are written to"

    # The first chunk alone: no thread holds the scores of a full cache yet.
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tiles = THREADS * 4 * CHUNK * (dim + 4)
    assert tiles <= THREADS * table["attention, each thread of the processor, at most, beside all below"]
    planned = table["results of embed, at most"] + table["results of prefill, at most"] + tiles
    # A kernel's buffers are counted as if all were alive at once; the code generator lets some follow one another.
    assert 0.85 * planned <= found["results"] <= 1.05 * planned

    in_all = table["in all for one sequence" if sequences == 1 else "in all for 2 sequences"]
    taken = found["weights"] + found["cache"] - 2 * views.CACHE_TABLES + found["results"] - tiles
    assert abs(taken / in_all - 1) < 0.05
    print({**table, **found})  # pytest -rP shows it


def test_a_gpu_gives_the_tables_their_memory():
    model = {
        "cache_bytes_per_token": 10,
        "cache_workspace_bytes": 7,
        "attention_thread_bytes": 0,
        "context_window": 100,
        "prefill_chunk": 8,
    }
    model["state_bytes"] = 0
    metadata = {
        "model": {**model, "max_batch": 3},
        "memory": {"embed": 40, "prefill": 500, "decode": 5},
        "params": [{"shape": [10, 2], "dtype": "float16"}],
        "target": {"target": "cuda"},
    }
    table = views.memory(metadata)
    tables = 134_217_728
    assert f"| KV cache, tables of the runtime | {tables:,} |" in table
    assert f"| in all for one sequence | {40 + 7 + tables + 40 + 500 + 1000:,} |" in table
    assert f"| in all for 3 sequences | {40 + 7 + tables + 40 + 500 + 3000:,} |" in table
    assert "tables" not in views.memory({**metadata, "target": {"target": "llvm"}})


@pytest.mark.slow
def test_the_state_of_a_recurrent_model_is_what_its_session_takes(tmp_path):
    assert views.STEPS_KEPT == state.HISTORY
    built = rwkv_models.build(tmp_path, rwkv_models.write_checkpoint(tmp_path / "checkpoint"), "q4f32_1")
    metadata = json.loads((tmp_path / "compile" / "metadata.json").read_text())
    table = views.memory(metadata)
    sizes = rwkv_models.MODEL["hidden_size"] * rwkv_models.MODEL["num_hidden_layers"] * 5 * 4
    assert f"| recurrent state, one sequence, 16 steps of it | {16 * sizes:,} |" in table
    assert "KV cache" not in table
    command = [sys.executable, "-c", MEASURE, str(built.root), "2"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 <= found["cache"] - 2 * 16 * sizes <= 0.1 * 2 * 16 * sizes
