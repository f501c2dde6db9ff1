"""What quantizing costs and what it costs in quality; every figure is a ratio or a bound, taken in one run.

Usage: python benchmarks/quantize.py [--runs N] [--only speed|tune|memory|perplexity] [--llama PYTHON] [--keep DIR]

Measured, on Llama-shaped checkpoints of 125M and 1.1B random bfloat16 weights in eight shards: MB of input per second
inside the stage (q4f16_1, outputs written and digested, kernels compiled before) on one processor, in its time, and on
two, by the clock, against blocked NumPy, whose outputs are written and digested too, and llama.cpp to Q4_0 (with the
interpreter PYTHON that has gguf and llama-cpp-python); a second run after a change in one shard; peak memory on a
13B-shaped checkpoint; and the perplexity of the example checkpoints in every scheme. Exit status 1 if one is missed.
Medians of interleaved runs count. The ratio of the fastest is shown beside: a shared machine only ever adds to a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the engine, and for the helpers of tests/ that write_checkpoint uses

from stagegraph.store.index import Index  # noqa: E402
from stagegraph.store.objects import Store  # noqa: E402

WORK = [sys.executable, str(ROOT / "benchmarks" / "quantize_work.py")]
LLAMA = str(ROOT / "benchmarks" / "quantize_llama.py")
# hidden size, layers, heads, key-value heads, feed-forward size, vocabulary
SHAPES = {
    "125M": (768, 12, 12, 4, 2048, 32000),
    "1.1B": (2048, 22, 32, 4, 5632, 32000),
    "13B": (5120, 40, 40, 40, 13824, 32000),
    "400M": (768, 12, 12, 4, 1536, 32000),
}
EXPERTS = {"400M": (8, 2)}  # of sizes that are mixtures: how many experts, and how many are chosen for each token
SHARDS = 8
CHANGED = 10  # tensors of one shard
ALL_KINDS = "kernels,conversion,digests,tensor"


@dataclass
class Figure:
    """One measured figure and what it must reach."""

    what: str
    measured: str
    required: str
    met: bool


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Return the checkpoint tensors of a Llama of that size, or of a Mixtral, in order."""
    hidden, layers, heads, kv_heads, ff, vocab = SHAPES[name]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    kv = hidden * kv_heads // heads
    feed_forward = {"mlp.gate_proj": (ff, hidden), "mlp.up_proj": (ff, hidden), "mlp.down_proj": (hidden, ff)}
    if name in EXPERTS:
        feed_forward = {"block_sparse_moe.gate": (EXPERTS[name][0], hidden)}
        for expert in range(EXPERTS[name][0]):
            for part, shape in (("w1", (ff, hidden)), ("w2", (hidden, ff)), ("w3", (ff, hidden))):
                feed_forward[f"block_sparse_moe.experts.{expert}.{part}"] = shape
    for i in range(layers):
        found |= {f"model.layers.{i}.{part}.weight": shape for part, shape in {
            "input_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,), **feed_forward,
        }.items()}  # fmt: skip
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_checkpoint(name: str, folder: Path, *, sparse: bool = False) -> int:
    """Write a checkpoint of random (sparse: zero) weights, parse and register it; return its bytes of weights."""
    from stages.config_parse import ConfigParse
    from stages.param_register import ParamRegister
    from tests.support.local_context import run_stage

    hidden, layers, heads, kv_heads, ff, vocab = SHAPES[name]
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "hidden_act": "silu",
        "intermediate_size": ff, "num_attention_heads": heads, "num_hidden_layers": layers, "rms_norm_eps": 1e-5,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 2048, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if name in EXPERTS:
        experts, chosen = EXPERTS[name]
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
        config |= {"num_local_experts": experts, "num_experts_per_tok": chosen}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = shapes_of(name)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    at = 0
    for tensor, shape in shapes.items():
        parts[at * SHARDS // total][tensor] = shape
        at += 2 * int(np.prod(shape))
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        write_shard(folder / file, part, seed=None if sparse else number)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    digest_files(folder)
    run_stage(ConfigParse(), folder / "parsed", {"checkpoint": str(folder)})
    inputs = {"config": folder / "parsed" / "model.json", "tensors": folder / "parsed" / "tensors.json"}
    run_stage(ParamRegister(), folder / "registered", {"scheme": "q4f16_1", "target": "llvm"}, inputs)
    return total


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], seed: int | None) -> None:
    """Write one safetensors file of normally distributed weights; without a seed, a hole of zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if seed is None:
            file.truncate(8 + len(text) + end)
            return
        random = np.random.default_rng(seed)
        values = (random.standard_normal(1 << 22, np.float32) * np.float32(0.02)).view(np.uint32) >> 16
        for number, shape in enumerate(shapes.values()):
            block = np.roll(values, number).astype(np.uint16)
            file.write(np.resize(block, shape).tobytes())


def digest_files(folder: Path) -> None:
    """Write the shards' digests, which the engine takes before the stage runs."""
    digests = {path.name: blake3(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")} if (
        folder.name != "13B") else {}  # fmt: skip
    (folder / "digests.json").write_text(json.dumps(digests))


def pinned(command: list[str], processors: int) -> str:
    """Run a command on that many processors; return what it prints. What it says of an error goes to ours."""
    chosen = sorted(os.sched_getaffinity(0))[:processors]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(processors)}
    limit = ["taskset", "-c", ",".join(map(str, chosen))]
    return subprocess.run([*limit, *command], check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


def run_stage_alone(
    checkpoint: Path, store: Path, processors: int, keep: str, *, clocked: bool = True
) -> dict[str, Any]:
    """Run the stage once in a process of its own, on a store that may hold earlier parts."""
    out = store / "out"
    command = [*WORK, "stage", str(checkpoint), str(out), str(processors), keep, "clocked" * clocked]
    printed = pinned(command, processors)
    shutil.rmtree(out)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def kernels_for(checkpoint: Path, work: Path) -> Path:
    """Return a new store that holds the kernels for a checkpoint and nothing else of it."""
    store = Path(tempfile.mkdtemp(dir=work, prefix="kernels-"))
    run_stage_alone(checkpoint, store, 2, "kernels", clocked=False)
    for path in (store / "objects").rglob("*"):
        if path.is_file() and not path.read_bytes().startswith(b"\x7fELF"):
            path.unlink()
    return store


@contextlib.contextmanager
def fresh(work: Path, seed: Path | None = None) -> Iterator[Path]:
    """A new folder, or a copy of ``seed``, to write to.

    Afterwards it is emptied, not removed: ext4 searches past inodes just freed, so that each run would pay for the
    last one's.
    """
    folder = Path(tempfile.mkdtemp(dir=work, prefix="run-"))
    if seed:
        shutil.copytree(seed, folder, dirs_exist_ok=True)
        verify_objects(folder)
    yield folder
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            os.truncate(path, 0)


def verify_objects(folder: Path) -> None:
    """Have the objects of a store verified, as the engine leaves them: copies and removed links changed their stats."""
    store = Store(folder, Index(folder / "index"))
    for digest in store.digests():
        store.verify(digest)
    store.index.close()


def speed(work: Path, runs: int, llama: str, sizes: list[str]) -> list[Figure]:
    """MB/s of input on one and two processors against the baselines, in turn, so that drift hits all."""
    figures = []
    for name in sizes:
        checkpoint = work / name
        size = write_checkpoint(name, checkpoint) if not checkpoint.is_dir() else checkpoint_bytes(checkpoint)
        gguf = work / f"{name}.gguf"
        if llama:
            subprocess.run([llama, LLAMA, "write", str(gguf), *map(str, SHAPES[name])], check=True)
        kernels = kernels_for(checkpoint, work)
        for processors, factor in ((1, 2.5), (2, 2.0)):
            clock = "cpu" if processors == 1 else "seconds"
            times: dict[str, list[float]] = {"stage": [], "NumPy": [], "llama.cpp": []}
            for _ in range(runs):
                with fresh(work, kernels) as store:
                    times["stage"].append(run_stage_alone(checkpoint, store, processors, "kernels")[clock])
                with fresh(work) as out:
                    command = [*WORK, "numpy", str(checkpoint), str(out / "out"), str(processors)]
                    times["NumPy"].append(json.loads(pinned(command, processors))[clock])
                if llama:
                    with fresh(work) as out:
                        command = [llama, LLAMA, "quantize", str(gguf), str(out / "out.gguf"), str(processors)]
                        times["llama.cpp"].append(json.loads(pinned(command, processors))[clock])
            figures += compared(f"{name}, {processors} thread{'s' * (processors > 1)}", size, times, factor)
        gguf.unlink(missing_ok=True)
    return figures


def compared(what: str, size: int, times: dict[str, list[float]], factor: float) -> list[Figure]:
    """Compare the stage with each baseline that ran."""
    figures = []
    ours = statistics.median(times["stage"])
    for baseline in ("NumPy", "llama.cpp"):
        if times[baseline]:
            theirs, fastest = statistics.median(times[baseline]), min(times[baseline]) / min(times["stage"])
            rates = f"{size / ours / 1e6:,.0f} MB/s, {theirs / ours:.2f} x ({size / theirs / 1e6:,.0f} MB/s)"
            shown = f"{rates}, fastest {fastest:.2f} x"
            figures.append(Figure(f"{what}, against {baseline}", shown, f">= {factor} x", theirs / ours >= factor))
    return figures


def checkpoint_bytes(checkpoint: Path) -> int:
    """Return the bytes of a checkpoint's shards."""
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def tune(work: Path, runs: int) -> list[Figure]:
    """A second run after ten tensors of one of eight shards were changed."""
    checkpoint = work / "1.1B"
    if not checkpoint.is_dir():
        write_checkpoint("1.1B", checkpoint)
    colds, seconds, reading, made = [], [], [], []
    shard = sorted(checkpoint.glob("*.safetensors"))[3]
    original = shard.read_bytes()
    header = json.loads(original[8 : 8 + int.from_bytes(original[:8], "little")])
    chosen = [name for name in header if len(header[name]["shape"]) == 2][:CHANGED]
    kernels = kernels_for(checkpoint, work)
    for run in range(runs):
        with fresh(work, kernels) as store:
            colds.append(run_stage_alone(checkpoint, store, 2, ALL_KINDS)["seconds"])
            verify_objects(store)
            payload = 8 + int.from_bytes(original[:8], "little")
            changed = bytearray(original)
            for name in chosen:
                changed[payload + header[name]["data_offsets"][0]] ^= run + 1
            shard.write_bytes(changed)
            digest_files(checkpoint)
            began = time.perf_counter()
            blake3(shard.read_bytes()).hexdigest()
            reading.append(time.perf_counter() - began)
            again = run_stage_alone(checkpoint, store, 2, ALL_KINDS)
            seconds.append(again["seconds"])
            made.append(again["parts"]["tensor"]["made"])
    shard.write_bytes(original)
    digest_files(checkpoint)
    register = json.loads((checkpoint / "registered" / "params.json").read_text())
    touched = sum(not set(chosen).isdisjoint(entry["sources"]) for entry in register["logical"])  # some are stacked
    cold, second, digest = (statistics.median(times) for times in (colds, seconds, reading))
    limit = digest + 0.1 * cold
    return [
        Figure(f"parameters made after {CHANGED} tensors changed", str(made[-1]), str(touched), set(made) == {touched}),
        Figure(
            "second run, one of 8 shards changed",
            f"{second:.2f} s (cold {cold:.2f} s, digesting the shard {digest:.2f} s)",
            f"<= {limit:.2f} s",
            second <= limit,
        ),
    ]


def memory(work: Path) -> list[Figure]:
    """Peak memory on a 13B-shaped checkpoint of zeros, every tensor converted."""
    checkpoint, store = work / "13B", work / "store-13B"
    write_checkpoint("13B", checkpoint, sparse=True)
    store.mkdir()
    peak = run_stage_alone(checkpoint, store, 2, "kernels", clocked=False)["peak"]
    limit = 3 * 4 * max(int(np.prod(shape)) for shape in registered_shapes(checkpoint)) + 300e6
    shutil.rmtree(checkpoint)
    shutil.rmtree(store)
    return [Figure("peak memory, 13B", f"{peak / 1e6:,.0f} MB", f"<= {limit / 1e6:,.0f} MB", peak <= limit)]


def registered_shapes(checkpoint: Path) -> list[list[int]]:
    """Return the shapes of the parameters that a checkpoint is registered as."""
    register = json.loads((checkpoint / "registered" / "params.json").read_text())
    return [entry["shape"] for entry in register["logical"]]


def show(figures: list[Figure]) -> bool:
    """Print figures as a table; say whether all are met."""
    width = max(len(figure.what) for figure in figures)
    for figure in figures:
        met = "ok" if figure.met else "MISSED"
        print(f"{figure.what:<{width}}  {figure.measured:<66}  {figure.required:<14}  {met}", flush=True)
    return all(figure.met for figure in figures)


def main() -> int:
    """Measure and print everything, or the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "tune", "memory", "perplexity"), default="")
    parser.add_argument("--llama", default="", metavar="PYTHON", help="interpreter that has gguf and llama-cpp-python")
    parser.add_argument("--sizes", nargs="+", choices=("125M", "1.1B"), default=["125M", "1.1B"], help="of speed")
    parser.add_argument("--keep", default="", metavar="DIR", help="where the synthetic checkpoints are made and stay")
    args = parser.parse_args()
    met = True
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.keep or temporary)
        work.mkdir(exist_ok=True)
        parts = {
            "speed": lambda: speed(work, args.runs, args.llama, args.sizes),
            "tune": lambda: tune(work, args.runs),
            "memory": lambda: memory(work),
            "perplexity": perplexities,
        }
        for name, measure in parts.items():
            if args.only in ("", name):
                met &= show(measure())
                for pattern in ("kernels-*", "run-*"):
                    for folder in work.glob(pattern):
                        shutil.rmtree(folder)
    return 0 if met else 1


def perplexities() -> list[Figure]:
    """Print the perplexity of both examples in every scheme; return what the search for scales gains."""
    from quantize_quality import table  # needs torch and transformers

    return [Figure(*row) for row in table()]


if __name__ == "__main__":
    sys.exit(main())
