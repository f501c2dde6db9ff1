"""What it costs to get from a real config.json to every exported graph, without a byte of weights.

Usage: python benchmarks/families.py [--config NAME] [--scheme NAME]   (exit status 1 if a figure is missed)
       python benchmarks/families.py --config NAME --write DIR   (the checkpoint, to build a library without weights of)

The checkpoint is a config of tests/data/configs and a safetensors file whose header is true and whose weights are a
hole. config-parse, param-register and graph-build run in one process, as in a warm worker; importing TVM counts. The
second table builds the graphs of the same model with fewer layers: the bytes of a layer must not grow.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MAX_SECONDS, MAX_BYTES = 10.0, 2e9
MAX_GROWTH = 1.1  # of the bytes of a layer, from the first half of the layers to the second


def build(folder: Path, scheme: str, frontend: str = "auto") -> dict[str, Any]:
    """Run the stages on the checkpoint in ``folder``; return the seconds of each node, those of processors in all, and
    the bytes of each graph.
    """
    from stagegraph.stage import SourceFiles
    from stages import profiles
    from stages.config_parse import ConfigParse
    from stages.graph import FUNCTIONS
    from stages.graph_build import GraphBuild
    from stages.param_register import ParamRegister
    from tests.support.local_context import LocalContext, run_stage

    seconds, sizes, started = {}, {}, time.perf_counter()

    def lap(node: str) -> None:
        nonlocal started
        seconds[node], started = time.perf_counter() - started, time.perf_counter()

    checkpoint = folder / "checkpoint"
    files = SourceFiles(checkpoint, {path.name: path for path in checkpoint.iterdir()}, {})
    (folder / "config").mkdir()
    params = ConfigParse.Params(checkpoint=str(checkpoint), context_window=0, frontend=frontend)
    ConfigParse().run(LocalContext(params, folder / "config", {}, {"checkpoint": files}))
    lap("config-parse")
    ports = {name: folder / "config" / ConfigParse.outputs[name].path for name in ("config", "tensors")}
    run_stage(ParamRegister(), folder / "params", {"scheme": scheme, "target": "llvm"}, ports)
    lap("param-register")
    profiles.compiler()
    lap("import tvm")
    inputs = {"config": ports["config"], "params": folder / "params" / "params.json"}
    for function in FUNCTIONS:
        run_stage(GraphBuild(), folder / function, {"target": "llvm", "function": function}, inputs)
        lap(f"graph-build[{function}]")
        sizes[function] = (folder / function / "module.json").stat().st_size
    return {"seconds": seconds, "bytes": sizes, "processors": time.process_time()}


def measured(folder: Path, config: dict[str, Any], scheme: str, frontend: str = "auto") -> dict[str, Any]:
    """Build in a process of its own; add its peak memory, in bytes."""
    from tests.support.checkpoints import write_hollow

    write_hollow(folder / "checkpoint", config)
    command = [sys.executable, __file__, "--build", str(folder), "--scheme", scheme, "--frontend", frontend]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    """Measure, print, and return 1 if a figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = ROOT / "tests" / "data" / "configs"
    parser.add_argument("--config", default="llama-2-7b", choices=sorted(path.stem for path in configs.glob("*.json")))
    parser.add_argument("--scheme", default="q4f16_1")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the checkpoint and measure nothing")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--frontend", default="auto", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        found = build(args.build, args.scheme, args.frontend)
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found))
        return 0
    config = json.loads((configs / f"{args.config}.json").read_text("utf-8"))
    if args.write:
        from tests.support.checkpoints import write_hollow

        write_hollow(args.write, config)
        return 0
    layers = config["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as scratch:
        few = measured(Path(scratch) / "few", {**config, "num_hidden_layers": layers // 4}, args.scheme)
        half = measured(Path(scratch) / "half", {**config, "num_hidden_layers": layers // 2}, args.scheme)
        whole = measured(Path(scratch) / "whole", config, args.scheme)
    print(f"{args.config}, {args.scheme}, {layers} layers\n")
    for node, seconds in whole["seconds"].items():
        print(f"{node:<24}{seconds:>8.2f} s")
    total = sum(whole["seconds"].values())
    ok = [total < MAX_SECONDS, whole["peak"] < MAX_BYTES]
    print(f"{'all nodes':<24}{total:>8.2f} s   required < {MAX_SECONDS:.0f} s   {'met' if ok[0] else 'MISSED'}")
    print(f"{'peak memory':<24}{whole['peak'] / 1e9:>8.2f} GB  required < {MAX_BYTES / 1e9:.0f} GB   ", end="")
    print("met" if ok[1] else "MISSED")
    print(f"\n{'layers':<24}" + "".join(f"{count:>12}" for count in (layers // 4, layers // 2, layers)))
    for function in ("prefill", "decode"):
        runs = few, half, whole
        print(f"{function + ', s':<24}" + "".join(f"{r['seconds'][f'graph-build[{function}]']:>12.2f}" for r in runs))
        print(f"{function + ', bytes':<24}" + "".join(f"{run['bytes'][function]:>12,}" for run in runs))
        first = half["bytes"][function] - few["bytes"][function]
        second = whole["bytes"][function] - half["bytes"][function]
        growth = second / first / (layers - layers // 2) * (layers // 2 - layers // 4)
        ok.append(growth < MAX_GROWTH)
        print(f"{'  bytes a layer':<24}{growth:>11.2f} x   required < {MAX_GROWTH} x   {'met' if ok[-1] else 'MISSED'}")
    return 0 if all(ok) else 1


if __name__ == "__main__":
    sys.exit(main())
