"""How fast CPU bundles run, against llama.cpp and transformers in the same run; every figure is a ratio of two medians.

Usage: python benchmarks/inference.py --llama PYTHON [--torch PYTHON] [--size 125M|1.1B|400M] [--only GROUP...]
                                      [--threads N] [--rounds N] [--keep DIR [--build]]

A Llama-shaped checkpoint of random weights goes through the pipeline in several schemes, with float and with int8
activations; 400M is a Mixtral of 8 experts, of which each token has two, beside llama.cpp's of the same shape. PYTHON
of --llama is an interpreter with gguf, and with llama-cpp-python or xllamacpp, whose llama.cpp has the same shape in
Q4_0, Q4_1, Q8_0 and F16 and, with libggml-python, in Q4_K and Q6_K (the head of Q4_1, Q4_K and Q6_K in Q8_0, as ours
have it in eight bits); that of --torch one with torch and transformers, which has it in bfloat16. A group named after a
side of ours compares others with that. In each round the sides run one after the other, each in a process of its own on
the same processors: prefill of 128 and 512 tokens, 16 decoding steps at contexts of 128 and 1,000.
The memory of our runtime is the most that it holds beyond what it held when its libraries were imported. Exit
status 1 if a figure is missed. With --keep a second run builds only what has changed, and --build only builds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

from quantize import EXPERTS, LLAMA, SHAPES, pinned, write_checkpoint  # noqa: E402

WORK = str(ROOT / "benchmarks" / "inference_work.py")
SPARE = 150_000_000  # bytes that a running model may take beside weights and KV cache
OURS = {  # side -> scheme, activations
    "int4": ("q4f16_1", "float"),
    "int4 int8": ("q4f16_1", "int8"),
    "q8": ("q8f16_1", "float"),
    "q8 int8": ("q8f16_1", "int8"),
    "f16": ("q0f16", "float"),
    "q4s32": ("q4s32", "float"),
    "q4a32": ("q4a32", "float"),
    "q4a64": ("q4a64", "float"),
    "q4k": ("q4k", "float"),
    "q6k": ("q6k", "float"),
    "fp8": ("e4m3_128", "float"),
    "mxfp4": ("mxfp4", "float"),
    "mxfp4 int8": ("mxfp4", "int8"),
    "q4a32 int8": ("q4a32", "int8"),
    "q4k int8": ("q4k", "int8"),
    "q6k int8": ("q6k", "int8"),
}
GROUPS = {  # baseline -> our sides beside it, with the least ratios of prefill and decode; 0 asks for nothing
    "Q4_0": {"int4": (0.8, 1.0), "int4 int8": (1.8, 1.25)},
    "Q8_0": {"q8": (0, 1.0), "q8 int8": (0, 1.0)},
    "F16": {"f16": (0, 1.0)},
    "bfloat16": {"int4": (0, 0), "int4 int8": (1.8, 8.0)},
    "Q4_1": {"q4a32": (0, 1.25), "q4a32 int8": (0, 1.25)},
    "Q4_K": {"q4k": (0, 1.25), "q4k int8": (0, 1.25)},
    "Q6_K": {"q6k": (0, 1.25), "q6k int8": (0, 1.25)},
    "q8": {"fp8": (0, 0)},
    # With a head of twice the bits.
    "int4": dict.fromkeys(("q4s32", "q4a32", "q4a64", "q4k", "mxfp4", "mxfp4 int8"), (0, 0)),
}
MIXTURE = {"Q4_0": {"int4": (0, 0), "int4 int8": (1.5, 1.25)}}  # of a mixture, what llama.cpp has of it
DEFAULT = ["Q4_0", "Q8_0", "F16", "bfloat16"]
OVERLAY = """\
extends: {root}/pipeline.yaml
name: {name}
vars: {{checkpoint: checkpoint, targets: [llvm], scheme: {scheme}, context_window: 2048}}
stages:
  compile: {{with: {{activations: {activations}}}}}
"""


class Setting(NamedTuple):
    """Where to work, on what, and with which interpreters."""

    folder: Path
    size: str
    threads: int
    llama: str
    torch: str


def bundle(setting: Setting, scheme: str, activations: str) -> str:
    """Build a bundle and return its path."""
    from stages.bundle import Bundle
    from tests.support.family_models import write_tokenizer
    from tests.support.local_context import run_stage

    folder, name = setting.folder, f"{scheme}-{activations}"
    tokenizer = folder / "tokenizer"  # random weights have no vocabulary
    if not tokenizer.is_dir():
        write_tokenizer(tokenizer, SHAPES[setting.size][-1])
    file = folder / f"{name}.yaml"
    file.write_text(OVERLAY.format(root=ROOT, name=name, scheme=scheme, activations=activations), encoding="utf-8")
    run = [sys.executable, "-m", "stagegraph.cli.main", "run", str(file)]
    pinned([*run, "--stage", "compile", "--stage", "quantize"], setting.threads)
    made = folder / "artifacts" / name
    inputs = {
        "library": made / "compile.llvm" / "model.so",
        "metadata": made / "compile.llvm" / "metadata.json",
        "weights": made / "quantize.llvm" / "weights",
        "config": made / "config-parse" / "model.json",
        "generation": made / "config-parse" / "generation.json",
        "tokenizer": tokenizer,
    }
    shutil.rmtree(folder / name, ignore_errors=True)
    out = run_stage(Bundle(), folder / name, {"target": "llvm", "name": name}, inputs).out
    return str(out / "bundle")


def gguf(setting: Setting, kind: str) -> str:
    """Write a GGUF file of that kind and return its path."""
    file = setting.folder / f"{kind}.gguf"
    if not file.exists():
        head = kind if kind in DEFAULT else "Q8_0"
        shape, experts = (map(str, table.get(setting.size, ())) for table in (SHAPES, EXPERTS))
        pinned([setting.llama, LLAMA, "write", str(file), *shape, kind, head, *experts], setting.threads)
    return str(file)


def commands(setting: Setting, groups: list[str]) -> dict[str, list[str]]:
    """Build what the groups need; return the command that measures each side."""
    if not (setting.folder / "checkpoint").is_dir():
        write_checkpoint(setting.size, setting.folder / "checkpoint")
    found: dict[str, list[str]] = {}
    for baseline in groups:
        for side in GROUPS[baseline]:
            if side not in found:
                found[side] = [sys.executable, WORK, "ours", bundle(setting, *OURS[side])]
        if baseline in OURS:
            found.setdefault(baseline, [sys.executable, WORK, "ours", bundle(setting, *OURS[baseline])])
        elif baseline == "bfloat16":
            found[baseline] = [setting.torch, WORK, "torch", str(setting.folder / "checkpoint" / "config.json")]
        else:
            found[baseline] = [setting.llama, WORK, "llama", gguf(setting, baseline)]
    return {side: [*command, str(setting.threads)] for side, command in found.items()}


class Table:
    """Rounds of every side: medians, and whether what is required is met."""

    def __init__(self, rounds: dict[str, list[dict[str, Any]]]) -> None:
        self.rounds = rounds
        self.missed = False

    def median(self, side: str, name: str, column: int = 0) -> float:
        """Return tokens per second by the clock, or per second of the processors."""
        return statistics.median(found[name][column] for found in self.rounds[side])

    def verdict(self, ok: bool, required: str) -> str:
        """Return what is said of a figure, and remember a miss."""
        self.missed |= not ok
        return f"({required} {'met' if ok else 'MISSED'})"

    def show_speeds(self, baseline: str) -> None:
        """Print a group: every measure of its sides, and their ratios to the baseline."""
        sides = [*GROUPS[baseline], baseline]
        print(f"{'tokens/s (per CPU second)':<26}" + "".join(f"{side:>20}" for side in sides))
        for name in (name for name in self.rounds[baseline][0] if name != "memory"):
            cells = [f"{self.median(side, name):.1f} ({self.median(side, name, 1):.1f})" for side in sides]
            verdicts = []
            for side, required in GROUPS[baseline].items():
                least = required[0] if name.startswith("prefill") else required[1]
                ratio = self.median(side, name) / self.median(baseline, name)
                said = f" {self.verdict(ratio >= least, f'>= {least} x')}" if least else ""
                verdicts.append(f"{side} {ratio:.2f} x{said}")
            print(f"{name:<26}" + "".join(f"{cell:>20}" for cell in cells) + "   " + ", ".join(verdicts))

    def show_memory(self) -> None:
        """Print what our runtime holds at most."""
        print(f"{'memory, MB':<12}{'peak':>8}{'imported':>10}{'model':>8}{'weights':>9}{'KV':>6}{'beside':>8}")
        for side, rounds in self.rounds.items():
            if "memory" in rounds[0]:
                found = max((found["memory"] for found in rounds), key=lambda memory: memory["peak"])
                model = found["peak"] - found["imported"]
                beside = model - found["weights"] - found["kv"]
                columns = found["peak"], found["imported"], model, found["weights"], found["kv"], beside
                widths = 8, 10, 8, 9, 6, 8
                row = "".join(f"{value / 1e6:>{width}.0f}" for value, width in zip(columns, widths, strict=True))
                print(f"{side:<12}{row}   {self.verdict(beside <= SPARE, f'<= {SPARE / 1e6:.0f}')}")


def main() -> int:
    """Measure, print the tables, say whether all is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama", metavar="PYTHON", help="interpreter that has gguf and a llama.cpp")
    parser.add_argument("--torch", metavar="PYTHON", default=sys.executable, help="one that has torch and transformers")
    parser.add_argument("--size", choices=("125M", "1.1B", *EXPERTS), default="125M")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="baselines to compare with")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="work here and leave it; default: a temporary directory")
    parser.add_argument("--build", action="store_true", help="build what is measured and stop")
    args = parser.parse_args()
    if args.size in EXPERTS:
        GROUPS.clear()
        GROUPS.update(MIXTURE)
    args.only = args.only or [name for name in DEFAULT if name in GROUPS]
    if {*args.only} - {*GROUPS}:
        parser.error(f"--size {args.size} is compared with {', '.join(GROUPS)}")
    if not args.llama and {*args.only} - {"bfloat16", *OURS}:
        parser.error("--llama PYTHON is the baseline: an interpreter with gguf and llama-cpp-python or xllamacpp")
    folder = (args.keep or Path(tempfile.mkdtemp(prefix="stagegraph-bench-"))).absolute()
    folder.mkdir(exist_ok=True)
    try:
        sides = commands(Setting(folder, args.size, args.threads, args.llama, args.torch), args.only)
        if args.build:
            return 0
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(args.rounds):  # in turn, so that drift of the machine hits all
            for side, command in sides.items():
                rounds[side].append(json.loads(pinned(command, args.threads).splitlines()[-1]))
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    table = Table(rounds)
    for baseline in args.only:
        table.show_speeds(baseline)
        print()
    table.show_memory()
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
