"""How fast CPU bundles run, against llama.cpp in the same run; every figure is a ratio of two medians.

Usage: python benchmarks/inference.py --llama PYTHON [--size 125M|1.1B] [--threads N] [--rounds N] [--keep DIR]

A Llama-shaped checkpoint of random weights goes through the pipeline as q4f32_1, once with float and once with int8
activations; PYTHON is an interpreter with gguf and llama-cpp-python, which quantizes the same shape to Q4_0. Each round
runs the three one after the other, each in a process of its own on the same processors: prefill of 128 and 512 tokens,
16 steps of decoding at contexts of 128 and 1,000. Exit status 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, CONTEXTS, STEPS = (128, 512), (128, 1000), 16
# measure -> least ratio to llama.cpp with float and with int8 activations
REQUIRED = {"prefill": {"float": 0.8, "int8": 1.8}, "decode": {"float": 1.0, "int8": 1.25}}
OVERLAY = """\
extends: {root}/pipeline.yaml
name: {activations}
vars: {{checkpoint: checkpoint, targets: [llvm], scheme: q4f32_1, context_window: 2048}}
stages:
  compile: {{with: {{activations: {activations}}}}}
"""
Step = Callable[[list[int]], object]


def ids_of(count: int, start: int = 0) -> list[int]:
    """Return ids that look drawn at random, the same on both sides."""
    return [3 + (7919 * (start + i)) % 31000 for i in range(count)]


def measure(begin: Callable[[], tuple[Step, Step, Callable[[], None]]]) -> Iterator[tuple[str, float, float]]:
    """Yield (measure, tokens per second by the clock, per second of the processors).

    ``begin`` returns, for a new sequence, what prefills ids, what decodes one, and what forgets the sequence.
    """
    for kind, sizes in (("prefill", PROMPTS), ("decode", CONTEXTS)):
        for size in sizes:
            prefill, decode, forget = begin()
            if kind == "decode":
                prefill(ids_of(size))
            clock, processor = time.perf_counter(), time.process_time()
            if kind == "prefill":
                prefill(ids_of(size))
            else:
                for token in ids_of(STEPS, size):
                    decode([token])
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            count = size if kind == "prefill" else STEPS
            forget()
            yield f"{kind} {size}", count / clock, count / processor


def ours(bundle: str) -> Callable[[], tuple[Step, Step, Callable[[], None]]]:
    """Load a bundle with its runtime."""
    from stages.runtime import manifest
    from stages.runtime.session import Session

    session = Session(manifest.read(Path(bundle)))

    def begin() -> tuple[Step, Step, Callable[[], None]]:
        sequence = session.add()
        return (
            lambda ids: session.prefill(sequence, ids),
            lambda ids: session.decode(sequence, ids[0]),
            lambda: session.remove(sequence),
        )

    return begin


def llama(model: str, threads: int) -> Callable[[], tuple[Step, Step, Callable[[], None]]]:
    """Load a GGUF file with llama.cpp."""
    import ctypes

    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 2048, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(loaded, params)

    def feed(ids: list[int]) -> None:
        for at in range(0, len(ids), 512):
            part = ids[at : at + 512]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(part))) == 0
        llama_cpp.llama_get_logits_ith(context, -1)[0]  # waits for the result

    def begin() -> tuple[Step, Step, Callable[[], None]]:
        return feed, feed, lambda: llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    return begin


def work(side: str, model: str, threads: int) -> dict[str, Any]:
    """Measure one side: once to warm up, then for real."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    begin = ours(model) if side == "ours" else llama(model, threads)
    for _ in measure(begin):
        pass
    return {name: [clock, processor] for name, clock, processor in measure(begin)}


def prepare(folder: Path, size: str, python: str, threads: int) -> dict[str, list[str]]:
    """Build the two bundles and the GGUF file; return the command that measures each."""
    sys.path.insert(0, str(ROOT))  # for the helpers of tests/ that this and write_checkpoint use
    from quantize import LLAMA, SHAPES, pinned, write_checkpoint

    from stages.bundle import Bundle
    from tests.local_context import run_stage
    from tests.stages.families import write_tokenizer

    write_checkpoint(size, folder / "checkpoint")
    tokenizer = write_tokenizer(folder / "tokenizer", SHAPES[size][-1])  # random weights have no vocabulary
    me = str(Path(__file__).resolve())
    commands = {}
    for activations in ("float", "int8"):
        file = folder / f"{activations}.yaml"
        file.write_text(OVERLAY.format(root=ROOT, activations=activations), encoding="utf-8")
        run = [sys.executable, "-m", "stagegraph.cli.main", "run", str(file)]
        pinned([*run, "--stage", "compile", "--stage", "quantize"], threads)
        made = folder / "artifacts" / activations
        inputs = {
            "library": made / "compile[llvm]" / "model.so",
            "metadata": made / "compile[llvm]" / "metadata.json",
            "weights": made / "quantize[llvm]" / "weights",
            "config": made / "config-parse" / "model.json",
            "generation": made / "config-parse" / "generation.json",
            "tokenizer": tokenizer,
        }
        out = run_stage(Bundle(), folder / activations, {"target": "llvm", "name": activations}, inputs).out
        commands[activations] = [sys.executable, me, "--work", "ours", str(out / "bundle")]
    plain, small = str(folder / "plain.gguf"), str(folder / "q4_0.gguf")
    pinned([python, LLAMA, "write", plain, *map(str, SHAPES[size])], threads)
    pinned([python, LLAMA, "quantize", plain, small, str(threads)], threads)
    commands["llama.cpp"] = [python, me, "--work", "llama", small]
    return commands


def main() -> int:
    """Measure, print the table, say whether all is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama", metavar="PYTHON", help="interpreter that has gguf and llama-cpp-python")
    parser.add_argument("--size", choices=("125M", "1.1B"), default="125M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="work here and leave it; default: a temporary directory")
    parser.add_argument("--work", nargs=2, metavar=("SIDE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        side, model = args.work
        print(json.dumps(work(side, model, args.threads)))
        return 0
    if not args.llama:
        parser.error("--llama PYTHON is the baseline: an interpreter with gguf and llama-cpp-python")
    from quantize import pinned  # not where --work runs: llama.cpp's interpreter has nothing of ours

    folder = args.keep or Path(tempfile.mkdtemp(prefix="stagegraph-bench-"))
    try:
        commands = prepare(folder, args.size, args.llama, args.threads)
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
        for _ in range(args.rounds):  # in turn, so that drift of the machine hits all
            for side, command in commands.items():
                printed = pinned([*command, "--threads", str(args.threads)], args.threads)
                rounds[side].append(json.loads(printed.splitlines()[-1]))
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return report(rounds)


def report(rounds: dict[str, list[dict[str, Any]]]) -> int:
    """Print the table: tokens per second by the clock (per second of the processors), and the ratios by the clock."""

    def median(side: str, name: str, column: int) -> float:
        return statistics.median(found[name][column] for found in rounds[side])

    missed = False
    print(f"{'tokens/s (per CPU second)':<26}" + "".join(f"{side:>20}" for side in rounds))
    for name in rounds["llama.cpp"][0]:
        cells = [f"{median(side, name, 0):.0f} ({median(side, name, 1):.0f})" for side in rounds]
        verdicts = []
        for side, least in REQUIRED[name.split()[0]].items():
            ratio = median(side, name, 0) / median("llama.cpp", name, 0)
            missed |= ratio < least
            verdicts.append(f"{side} {ratio:.2f} x (>= {least} x {'met' if ratio >= least else 'MISSED'})")
        print(f"{name:<26}" + "".join(f"{cell:>20}" for cell in cells) + "   " + ", ".join(verdicts))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
