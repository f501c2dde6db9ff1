"""How du, gc and fsck grow: a store of 200,000 objects that 5,000 runs and their memoised parts made.

Usage: python benchmarks/scale_store.py [--objects N] [--runs N] [--folder DIR]   (exit status 1 if a bound is missed)

CPU seconds and memory are those of the verb's process, judged by the imports of :mod:`yardstick`. Beside each verb
another process takes the store's lock as a run does, again and again; how long it had to wait at most is what the verb
held runs up for (on a busy machine the scheduler's delays are in it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yardstick
from scale import STAGES, measure

from stagegraph.digest import digest_bytes, digest_json
from stagegraph.store.memo import PART_SCHEMA
from stagegraph.store.record import artifact_digest, new_record
from stagegraph.store.workspace import Workspace

SECONDS = {"du": 5.0, "gc": 5.0, "fsck": 8.0}
MIB = 250
LOCK_SECONDS = 0.2
WAITER = """
import sys, time
from pathlib import Path
from stagegraph.store.workspace import Workspace
workspace, longest = Workspace(Path("artifacts")), 0.0
while not Path("stop").exists():
    began = time.monotonic()
    with workspace.sharing():
        longest = max(longest, time.monotonic() - began)
    time.sleep(0.02)
print(longest)
"""


def fill(folder: Path, objects: int, runs: int) -> None:
    """Make the store of ``runs`` runs of one node, and parts, with so many objects in all."""
    (folder / "trivial.py").write_text(STAGES.lstrip(), encoding="utf-8")
    text = "version: 1\nname: large\nstages:\n  n0: {uses: './trivial.py:Step', with: {value: 1}}\n"
    (folder / "pipeline.yaml").write_text(text, encoding="utf-8")
    measure(folder, "run")
    workspace = Workspace(folder / "artifacts")
    sample = next(workspace.records())
    stats = {}

    def put(number: int) -> tuple[str, int]:
        content = f"{number}\n".encode()
        digest = digest_bytes(content)
        path = workspace.store.path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o444)
        stats[f"obj:{digest}"] = list(_stat(path))
        return digest, len(content)

    for number in range(runs):
        document = {**sample["document"], "params": {"value": number + 2}}
        key = digest_json(document)
        files = {"out.txt": list(put(number))}
        event = {name: sample[name] for name in ("facts", "warnings", "summary", "parts", "cpu_seconds", "peak_bytes")}
        ended = {**event, "views": {}, "outputs": {"out": files}}
        record = new_record("step", key, document, {}, ended, "2026-01-01T00:00:00Z", 0.1)  # type: ignore[arg-type]
        assert record["outputs"]["out"]["digest"] == artifact_digest(files)
        workspace.index.files.set(f"rec:{key}", record)
        node = {"node": "n0", "outcome": "BUILT", "key": key, "seconds": 0.1, "reason": "value", "summary": ""}
        node |= {"reasons": ["value"], "problems": [], "bytes": 5, "peak_bytes": 1, "log": None}
        run = {"pipeline": "large", "started": "2026-01-01T00:00:00Z", "seconds": 0.1, "state": "ok", "command": []}
        workspace.journal.append({**run, "nodes": [node]})  # type: ignore[typeddict-item]
    for number in range(runs, objects):
        digest, size = put(number)
        entry = {"schema": PART_SCHEMA, "kind": "piece", "digest": digest, "size": size, "facts": {}}
        workspace.index.files.set(f"part:{digest_json(['piece', number])}", entry)
    workspace.index.set_all(stats)
    measure(folder, "run", "--force")  # so that the last run is that of the file
    workspace.close()


def _stat(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def main() -> int:
    """Print a row for each verb; return how many bounds were missed, at most one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=5_000)
    parser.add_argument("--folder", type=Path, help="where the store is made (default: that of temporary files)")
    args = parser.parse_args()
    missed = 0
    share = args.objects / 200_000
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        fill(folder, args.objects, args.runs)
        print(f"{args.objects:,} objects, {args.runs:,} runs; {yardstick.HEAD}")
        print(f"{'verb':6} {'CPU s':>7} {'MiB':>6} {'imports':>8}  bound")
        for verb, *more in (["du"], ["fsck"], ["gc", "--max-size", "0B", "--yes"]):
            waiter = subprocess.Popen([sys.executable, "-c", WAITER], cwd=folder, stdout=subprocess.PIPE, text=True)
            time.sleep(1)
            try:
                seconds, mebibytes = measure(folder, verb, *more)
            finally:
                (folder / "stop").touch()
                waited = float(waiter.communicate()[0])
                (folder / "stop").unlink()
            imports = yardstick.import_seconds()
            text, met = yardstick.judge(seconds, SECONDS[verb] * share, imports)
            bounds = {
                text: met,
                f"{MIB} MiB": mebibytes <= MIB,
                f"a run waited {waited:.2f} s ({LOCK_SECONDS} s)": waited <= LOCK_SECONDS,
            }
            missed += not all(bounds.values())
            told = ", ".join(text if ok else f"{text} MISSED" for text, ok in bounds.items())
            print(f"{verb:6} {seconds:7.2f} {mebibytes:6.0f} {imports:8.3f}  {told}", flush=True)
        left = measure_json(folder)
        print(f"left: {left['bytes']} B of objects")
    return min(missed, 1)


def measure_json(folder: Path) -> dict[str, int]:
    """Return what du says of the store."""
    command = [sys.executable, "-c", "from stagegraph.cli.main import main; main()", "du", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
