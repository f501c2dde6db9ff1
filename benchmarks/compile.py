"""How long compile takes: cold, for more layers, after one change, and for a second model of the same shapes.

Usage: python benchmarks/compile.py [--only ROW ...] [--rounds N]   (exit status 1 if a figure is missed)

A Llama-shaped model of 125M parameters goes from a real config.json, without a byte of weights, to graphs; then compile
runs in one warm process, as in a worker that has compiled another model before. Cold starts with an empty memo; the
others follow a cold one and find in the memo what that kept. Seconds are the least of the rounds, by the clock and of
the processors.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_theta": 1e4, "torch_dtype": "float16",
}  # fmt: skip
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
OTHER = {**LLAMA, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}  # warms the process
SCHEMES = {"llvm": "q4f32_1", "cuda": "q4f16_1"}
SPREAD, OPERATOR, SECOND = 1.5, 0.20, 0.15


class Seconds(NamedTuple):
    """What a run took, by the clock and of the processors, children included."""

    clock: float
    processor: float


class Bench:
    """Graphs by what they are of, and compile runs on them."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.rounds = rounds
        self.known: dict[str, tuple[dict[str, Any], Path]] = {}
        self.warm: set[str] = set()

    def graphs(self, target: str, config: dict[str, Any]) -> tuple[dict[str, Any], Path]:
        """Return the ports of the graphs and the register of a model."""
        from tests.support.checkpoints import write_hollow
        from tests.support.compiled_qwen import Registered, build_graphs
        from tests.support.family_models import parse_and_register

        key = f"{target} {config}"
        if key not in self.known:
            folder = self.folder / f"model{len(self.known)}"
            write_hollow(folder / "checkpoint", config)
            ports = parse_and_register(folder, folder / "checkpoint", SCHEMES[target], target)
            registered = Registered(ports["config"], ports["params"])
            self.known[key] = build_graphs(folder, registered, target), registered.params
        return self.known[key]

    def compiled(self, target: str, config: dict[str, Any], memo: Path, **options: Any) -> Seconds:
        """Run compile once."""
        from stages.compile import Compile
        from tests.support.local_context import run_stage

        ports, register = self.graphs(target, config)
        before = time.perf_counter(), _processors()
        run_stage(Compile(), self.folder / "out", {"target": target, **options}, {**ports, "params": register}, memo)
        after = time.perf_counter(), _processors()
        shutil.rmtree(self.folder / "out")
        return Seconds(after[0] - before[0], after[1] - before[1])

    def measure(self, target: str, *configs: dict[str, Any], shared: bool = False, **options: Any) -> list[Seconds]:
        """Return the least seconds of compile for each of ``configs``, which take turns: what slows this machine down
        does so to all. Each begins with an empty memo, or, ``shared``, with that of those before it.
        """
        if target not in self.warm:
            self.compiled(target, OTHER, self.folder / "warm", **options)
            self.warm.add(target)
        rounds = []
        for _ in range(self.rounds):
            memos = [Path(tempfile.mkdtemp(dir=self.folder)) for _ in configs]
            rounds.append(
                [
                    self.compiled(target, config, memos[0] if shared else memo, **options)
                    for config, memo in zip(configs, memos, strict=True)
                ]
            )
        return [Seconds(*map(min, zip(*found, strict=True))) for found in zip(*rounds, strict=True)]


def _processors() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def report(name: str, found: Seconds, measured: str = "", ok: bool | None = None) -> bool:
    """Print one row; return whether the figure is met, which one that is only shown always is."""
    verdict = "" if ok is None else "met" if ok else "MISSED"
    print(f"{name:<38}{found.clock:>8.2f} s{found.processor:>9.2f} s   {measured:<36}{verdict}", flush=True)
    return ok is not False


def cold(bench: Bench, target: str, limit: float, **options: Any) -> bool:
    """Compile LLAMA from nothing."""
    (found,) = bench.measure(target, LLAMA, **options)
    archs = f", {len(options['archs'])} architectures" if "archs" in options else ""
    return report(f"{target}{archs}, cold", found, f"required <= {limit:.0f} s", found.clock <= limit)


def layers(bench: Bench, target: str, **options: Any) -> bool:
    """Compile models of 2, 12 and 24 layers, each cold."""
    counts = (2, 12, 24)
    found = bench.measure(target, *({**LLAMA, "num_hidden_layers": n} for n in counts), **options)
    for count, seconds in zip(counts, found, strict=True):
        report(f"{target}, {count} layers, cold", seconds)
    clocks = [seconds.clock for seconds in found]
    spread = max(clocks) / min(clocks)
    return report(
        f"{target}, slowest to fastest", found[-1], f"{spread:.2f} x, required <= {SPREAD} x", spread <= SPREAD
    )


def again(bench: Bench, target: str, what: str, config: dict[str, Any], limit: float, **options: Any) -> bool:
    """Compile ``config`` after LLAMA, against LLAMA cold."""
    whole, found = bench.measure(target, LLAMA, config, shared=True, **options)
    share = found.clock / whole.clock
    return report(
        f"{target}, {what}", found, f"{share:.1%} of {whole.clock:.2f} s, required <= {limit:.0%}", share <= limit
    )


ONE, FOUR = {"archs": (80,)}, {"archs": (80, 86, 89, 90)}
CHANGED = {**LLAMA, "rms_norm_eps": 1e-6}
ROWS: dict[str, Callable[[Bench], bool]] = {
    "cpu-cold": lambda bench: cold(bench, "llvm", 10),
    "cpu-layers": lambda bench: layers(bench, "llvm"),
    "cpu-operator": lambda bench: again(bench, "llvm", "one operator changed", CHANGED, OPERATOR),
    "cpu-second": lambda bench: again(bench, "llvm", "second model of the shapes", MISTRAL, SECOND),
    "cuda-one": lambda bench: cold(bench, "cuda", 15, **ONE),
    "cuda-four": lambda bench: cold(bench, "cuda", 30, **FOUR),
    "cuda-operator": lambda bench: again(bench, "cuda", "one operator changed", CHANGED, OPERATOR, **ONE),
    "cuda-second": lambda bench: again(bench, "cuda", "second model of the shapes", MISTRAL, SECOND, **ONE),
}


def main() -> int:
    """Measure, print, and return 1 if a figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from stages import profiles

    profiles.compiler()
    print(f"{'':<38}{'clock':>10}{'processors':>11}   {len(os.sched_getaffinity(0))} processors\n")
    with tempfile.TemporaryDirectory() as folder:
        met = [ROWS[name](Bench(Path(folder) / name, args.rounds)) for name in args.only]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
