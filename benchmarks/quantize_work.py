"""What benchmarks/quantize.py runs in processes of their own: the stage, and blocked NumPy; each prints JSON.

Usage: python benchmarks/quantize_work.py stage|numpy ARGUMENTS (see the functions); the caller pins processors.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from host_memory import settle

from stagegraph.stage import NewPart, Part, Source, SourceFiles
from stagegraph.store.memo import Memo, PartCode
from stages.quantize import Quantize


class Context:
    """A stage's context on a folder; ``keep`` are the kinds of parts that may be reused."""

    def __init__(self, params: Any, out: Path, inputs: dict[str, Path], source: SourceFiles, keep: set[str]) -> None:
        self.params, self.out = params, out
        self._inputs, self._source, self._keep = inputs, source, keep
        self.memo = Memo.open(out.parent, dict.fromkeys(Quantize.parts, PartCode("as it is", {})), fresh=False)

    def input(self, port: str) -> Path:
        """Return an input."""
        return self._inputs[port]

    def source(self, _name: str) -> SourceFiles:
        """Return the checkpoint."""
        return self._source

    def recall(self, kind: str, document: dict[str, Any]) -> Part | None:
        """Return a part of a kind that is kept."""
        return self.memo.recall(kind, document) if kind in self._keep else None

    def remember(self, kind: str, document: dict[str, Any], file: Path, **facts: Any) -> Part:
        """Keep a part."""
        return self.memo.remember(kind, document, file, **facts)

    def remember_all(self, kind: str, parts: Sequence[NewPart]) -> None:
        """Keep several parts."""
        self.memo.remember_all(kind, parts)

    def progress(self, *_: object) -> None:
        """Nobody watches."""

    fact = view = summary = progress

    def warn(self, message: str) -> None:
        """Slow kernels would be measured in silence."""
        raise SystemExit(message)


def high_water() -> int:
    """Return the peak resident memory of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")))


def stage(folder: str, out: str, threads: str, keep: str, clocked: str = "clocked") -> dict[str, Any]:
    """Run the stage on a checkpoint in ``folder``: seconds inside, tensors made and reused, peak memory."""
    import diskcache  # noqa: F401 - imports are on nobody's clock

    from stages.conversion import model  # noqa: F401
    from stages.quantization import schemes  # noqa: F401

    root, target = Path(folder), Path(out)
    files = {path.name: path for path in sorted(root.glob("*.safetensors"))}
    digests = json.loads((root / "digests.json").read_text())
    params = Quantize.Params(Source(root), "q4f16_1", "llvm", threads=int(threads))
    inputs = {"params": root / "registered" / "params.json", "tensors": root / "parsed" / "tensors.json"}
    target.mkdir(parents=True)
    context = Context(params, target, inputs, SourceFiles(root, files, digests), set(keep.split(",")))
    if clocked:
        settle(root.glob("*.safetensors"), target.parent)
    began, cpu = time.perf_counter(), time.process_time()
    Quantize().run(context)  # type: ignore[arg-type]
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    counts = {kind: dict(found) for kind, found in context.memo.counts.items()}
    return {"seconds": seconds, "cpu": cpu, "parts": counts, "peak": high_water()}


def numpy_blocks(folder: str, out: str, threads: str) -> dict[str, Any]:
    """Quantize every matrix with blocked NumPy, write and digest the results: seconds."""
    from stages.checkpoint.tensors import Weights
    from stages.quantization import group
    from stages.quantization.schemes import SCHEMES

    root, target = Path(folder), Path(out)
    tensors = json.loads((root / "parsed" / "tensors.json").read_bytes())["tensors"]
    weights = Weights({path.name: path for path in root.glob("*.safetensors")}, tensors)
    target.mkdir(parents=True)

    def convert(number: int, name: str) -> None:
        array = weights[name]
        pair = group.quantize(array, SCHEMES["q4f16_1"].body) if array.ndim == 2 else [array.astype(np.float16)]
        with (target / str(number)).open("wb") as file:
            for tensor in pair:
                data = tensor.reshape(-1).view(np.uint8).data
                file.write(data)
                blake3(data).hexdigest()

    settle(root.glob("*.safetensors"), target.parent)
    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(int(threads)) as pool:
        list(pool.map(convert, range(len(tensors)), tensors))
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


if __name__ == "__main__":
    run = {"stage": stage, "numpy": numpy_blocks}[sys.argv[1]]
    print(json.dumps(run(*sys.argv[2:])))
