"""How much memory calibrate takes at most, with feedback, on a Llama of a 7B's width: layers do not add to it.

Usage: python benchmarks/calibrate.py [--layers N...] [--tokens N]

Checkpoints of random bfloat16 weights (hidden 4096, feed-forward 11008, vocabulary 32,000) with so many layers are
calibrated in a process of its own each, as the stage does it, on ids drawn at random. Printed is the most that the
process held (pages of the files that it mapped included), which must be below 8 GB, and its time. What grows with the
number of layers is what is written: 170 MB a layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import quantize

MOST = 8e9  # bytes
PIECE = 512  # tokens, as calibrate reads them
HIDDEN, HEADS, FEED_FORWARD, VOCABULARY = 4096, 32, 11008, 32000


def measured(layers: int, tokens: int, folder: Path) -> tuple[int, float]:
    """Return the most bytes that calibrating a model of so many layers held, and its seconds of the processors."""
    quantize.SHAPES["wide"] = (HIDDEN, layers, HEADS, HEADS, FEED_FORWARD, VOCABULARY)
    checkpoint, feedback = folder / "checkpoint", folder / "feedback"
    quantize.write_checkpoint("wide", checkpoint)
    feedback.mkdir()
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (tokens // PIECE, PIECE))
    request = {
        "root": str(checkpoint),
        "files": {path.name: str(path) for path in checkpoint.glob("*.safetensors")},
        "config": str(checkpoint / "parsed" / "model.json"),
        "pieces": ids.tolist(),
        "skipped": 0,
        "scratch": str(folder),
        "feedback": str(feedback),
    }
    asked = folder / "request.json"
    asked.write_text(json.dumps(request))
    command = [sys.executable, "-m", "stages.calibration.moments", str(asked), str(folder / "result.npz")]
    env = {**os.environ, "PYTHONPATH": str(quantize.ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, "calibrating failed"
    return 1024 * used.ru_maxrss, used.ru_utime + used.ru_stime


def main() -> int:
    """Print a line for each number of layers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=4096)
    asked = parser.parse_args()
    found = []
    for layers in asked.layers:
        with tempfile.TemporaryDirectory() as folder:
            held, seconds = measured(layers, asked.tokens, Path(folder))
        found.append(held)
        print(f"{layers} layers: at most {held / 1e9:.2f} GB, {seconds:.0f} s of the processors", flush=True)
    return int(max(found) > MOST)


if __name__ == "__main__":
    sys.exit(main())
