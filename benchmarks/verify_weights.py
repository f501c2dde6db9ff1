"""What verify's comparison of a bundle's weights with the checkpoint's costs, on one processor and on two.

Usage: python benchmarks/verify_weights.py [--size NAME] [--schemes NAME ...] [--runs N] [--keep DIR]
       (exit status 1 if a bound is missed)

A Llama-shaped checkpoint of random bfloat16 weights is quantized, and what comes out is compared with it. Shown are CPU
seconds a GB of the checkpoint on one processor, and by the clock how much faster two are; medians. On busy processors
neither says much. verify digests the bundle's files before, which is shown beside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import yardstick
from quantize import checkpoint_bytes, pinned, write_checkpoint

from stages.checkpoint.tensors import Weights
from stages.param_register import ParamRegister
from stages.quantize import Quantize
from stages.runtime import tensor_cache
from stages.runtime.folder import Folder
from stages.verification import weights
from tests.support.local_context import run_stage

CPU_SECONDS, FASTER = 1.5, 1.7  # a GB; of two processors


def make(checkpoint: Path, scheme: str) -> None:
    """Register and quantize a checkpoint."""
    parsed, made, how = checkpoint / "parsed", checkpoint / scheme, {"scheme": scheme, "target": "llvm"}
    inputs = {"config": parsed / "model.json", "tensors": parsed / "tensors.json"}
    run_stage(ParamRegister(), made / "registered", how, inputs)
    inputs = {"params": made / "registered" / "params.json", "tensors": parsed / "tensors.json"}
    run_stage(Quantize(), made / "quantized", {"checkpoint": str(checkpoint), **how}, inputs)


def compare(checkpoint: Path, scheme: str) -> dict[str, float]:
    """Compare what was made of a checkpoint with it; return the seconds that it took."""
    made = checkpoint / scheme
    registry = json.loads((made / "registered" / "params.json").read_bytes())
    tensors = json.loads((checkpoint / "parsed" / "tensors.json").read_bytes())["tensors"]
    files = {path.name: path for path in checkpoint.glob("*.safetensors")}
    records = tensor_cache.records(Folder(made / "quantized" / "weights"))
    for path in files.values():
        path.read_bytes()  # what a disk takes is not ours
    digests = time.process_time()
    for shard in {record.shard for record in records.values()}:
        with shard.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    began, cpu = time.perf_counter(), time.process_time()
    found = weights.differences(registry, records, Weights(files, tensors))
    seconds, used = time.perf_counter() - began, time.process_time() - cpu
    assert not found, found
    return {"seconds": seconds, "cpu": used, "digests": cpu - digests}


def main() -> int:
    """Print a row for each scheme; return how many bounds were missed, at most one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("125M", "1.1B"), default="1.1B")
    parser.add_argument("--schemes", nargs="+", default=["q4f16_1", "q0f16"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", default="", metavar="DIR", help="where the checkpoint is made and stays")
    parser.add_argument("--alone", nargs=2, metavar=("FOLDER", "SCHEME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(compare(Path(args.alone[0]), args.alone[1])))
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(args.keep or temporary) / args.size
        if not checkpoint.is_dir():
            write_checkpoint(args.size, checkpoint)
        size = checkpoint_bytes(checkpoint) / 1e9
        print(f"{size:.2f} GB of weights; load {os.getloadavg()[0]:.1f}", flush=True)
        for scheme in args.schemes:
            if not (checkpoint / scheme).is_dir():
                make(checkpoint, scheme)
            command = [sys.executable, __file__, "--alone", str(checkpoint), scheme]
            found = {threads: [json.loads(pinned(command, threads)) for _ in range(args.runs)] for threads in (1, 2)}
            cpu = statistics.median(each["cpu"] for each in found[1]) / size
            one, two = (statistics.median(each["seconds"] for each in found[threads]) for threads in (1, 2))
            digests = statistics.median(each["digests"] for each in found[1]) / size
            seconds = yardstick.judge(cpu, CPU_SECONDS, yardstick.import_seconds())
            judged = [seconds, (f">= {FASTER} x", one / two >= FASTER)]
            missed += not all(met for _, met in judged)
            told = ", ".join(text if met else f"{text} MISSED" for text, met in judged)
            print(
                f"{scheme:10} {cpu:5.2f} CPU s a GB (digests before: {digests:.2f}), two processors "
                f"{one / two:.2f} x  {told}",
                flush=True,
            )
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
