"""What a shared store costs and withstands: machines are folders of this one, with a directory as remote.

Usage: python benchmarks/sharing.py [--mib N] [--only NAME ...]   (exit status 1 if a bound is missed)

``second``: a machine that takes all from a remote, against copying the bytes. ``damaged``: results in a remote that
are flipped, truncated, unsigned or signed by a stranger. ``dead``: a remote that is listened at and never answers.
``no_op``: a run without news where remotes and a cluster are configured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yardstick
from scale import measure

STAGE = '''
"""A stage that writes bytes."""
from __future__ import annotations
import random
from dataclasses import dataclass
from pathlib import Path
from stagegraph.stage import Context, Out, Stage, param


class Bytes(Stage):
    """Write random bytes of a seed."""

    id = "bytes"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        seed: int = param("the seed")
        mib: int = param("how many MiB")
        notes: str = param("folder in which a start is noted", hashed=False)

    outputs = {"out": Out("out.bin", "the bytes")}

    def run(self, ctx: Context) -> None:
        (Path(ctx.params.notes) / str(ctx.params.seed)).touch()
        numbers = random.Random(ctx.params.seed)
        with (ctx.out / "out.bin").open("wb") as file:
            for _ in range(ctx.params.mib or 1):
                file.write(numbers.randbytes((1 << 20) if ctx.params.mib else 100))
'''
NODES = 8
COPIES = 1.5  # times the time that copying the bytes takes
DEAD_SECONDS = 3.0
NO_OP_SECONDS = 0.12  # CPU
OF_REMOTES = {"obstore", "cryptography", "asyncssh", "distributed", "dask", "stagegraph.remote.shared"}
Row = tuple[str, float, str, bool]


class Machine:
    """A folder with a pipeline and a store of its own, and a user with a configuration and a key."""

    def __init__(self, folder: Path, mib: int = 0, first: int = 0) -> None:
        self.folder = folder
        (folder / "notes").mkdir(parents=True)
        (folder / "made.py").write_text(STAGE.lstrip())
        given = {"mib": mib, "notes": str(folder / "notes")}
        entries = {f"n{i}": {"uses": "./made.py:Bytes", "with": {"seed": first + i, **given}} for i in range(NODES)}
        (folder / "pipeline.yaml").write_text(json.dumps({"version": 1, "name": "bytes", "stages": entries}))

    def configure(self, url: str, mode: str, trusted: str = "", **more: object) -> None:
        """Write the user's configuration: one remote, and a key that is believed."""
        keys = {"here": trusted} if trusted else {}
        config = {"remotes": {"team": {"url": url, "mode": mode}}, "trusted": keys, **more}
        (self.folder / "config.yaml").write_text(json.dumps(config))

    def run(self, *words: str) -> tuple[float, list[str]]:
        """Run a verb; return the seconds that it took, and the lines that it said."""
        began = time.monotonic()
        command = [sys.executable, "-m", "stagegraph.cli.main", *(words or ("run",))]
        environment = {**os.environ, "STAGEGRAPH_CONFIG": str(self.folder / "config.yaml")}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=True,
        )  # fmt: skip
        return time.monotonic() - began, done.stdout.splitlines()

    def key(self) -> str:
        """Return the user's public key."""
        return self.run("remote", "key")[1][-1].strip()

    @property
    def ran(self) -> int:
        """How many nodes have run here."""
        return len(list((self.folder / "notes").iterdir()))


def second(folder: Path, mib: int) -> Iterator[Row]:
    """Yield (what, figure, bound, whether it was met) of a machine that takes all from a remote."""
    here, there = Machine(folder / "here", mib // NODES), Machine(folder / "there", mib // NODES)
    here.configure(str(folder / "remote"), "both")
    here.run()
    began = time.monotonic()
    for path in (folder / "remote" / "objects").glob("*/*"):
        shutil.copyfile(path, folder / path.name)
        with (folder / path.name).open("rb") as file:
            os.fsync(file.fileno())
    copied = time.monotonic() - began
    there.configure(str(folder / "remote"), "read", here.key())
    took, _ = there.run()
    yield f"second machine, {mib} MiB, s", took, "", True
    yield "of the time to copy the bytes", took / copied, f"<= {COPIES}", took <= COPIES * copied
    yield "nodes that it ran", there.ran, "0", there.ran == 0


def damaged(folder: Path, mib: int) -> Iterator[Row]:  # noqa: ARG001 - of small files
    """Yield the same of a remote whose results cannot be believed."""
    here, stranger = Machine(folder / "here"), Machine(folder / "stranger")
    for machine in (here, stranger):
        machine.configure(str(machine.folder / "remote"), "both")
        machine.run()
    for how in ("flipped", "truncated", "unsigned", "of a stranger"):
        there = Machine(folder / how)
        remote = there.folder / "remote"
        shutil.copytree(here.folder / "remote", remote)
        spoil(remote, how, stranger.folder / "remote")
        there.configure(str(remote), "read", here.key())
        _, said = there.run()
        warnings = sum(line.endswith("; ignored") for line in said)
        yield f"{how}: delivered, of {NODES}", NODES - there.ran, "0", there.ran == NODES
        yield f"{how}: warnings", warnings, f"{NODES}", warnings == NODES


def spoil(remote: Path, how: str, other: Path) -> None:
    """Damage every object of a remote, or take what signs its records; or put others' records in their place."""
    what = "objects/*/*" if how in ("flipped", "truncated") else "records/*/*/*"
    for path in list(remote.glob(what)):
        content = path.read_bytes()
        path.chmod(0o644)
        if how == "flipped":
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        elif how == "truncated":
            path.write_bytes(content[:-1])
        elif how == "unsigned":
            path.write_text(json.dumps({**json.loads(content), "signature": ""}))
        else:
            (theirs,) = (other / path.relative_to(remote)).parent.iterdir()
            path.write_bytes(theirs.read_bytes())


def dead(folder: Path, mib: int) -> Iterator[Row]:  # noqa: ARG001 - of small files
    """Yield the same of a remote that never answers."""
    alone, machine = Machine(folder / "alone"), Machine(folder / "machine")
    alone.configure(str(folder / "remote"), "none")
    took, _ = alone.run()
    with socket.create_server(("127.0.0.1", 0)) as server:
        machine.configure(f"http://127.0.0.1:{server.getsockname()[1]}", "read", "0" * 64)
        waited, _ = machine.run()
    yield "dead remote, s beyond a run without", waited - took, f"<= {DEAD_SECONDS}", waited - took <= DEAD_SECONDS
    yield f"nodes that ran, of {NODES}", machine.ran, f"{NODES}", machine.ran == NODES


def no_op(folder: Path, mib: int) -> Iterator[Row]:  # noqa: ARG001 - of small files
    """Yield the same of a run without news."""
    machine = Machine(folder / "machine")
    machine.configure(str(folder / "remote"), "both")
    machine.run()
    executor = {"kind": "dask", "scheduler": "tls://127.0.0.1:1"}
    machine.configure(str(folder / "remote"), "both", "0" * 64, executor=executor)
    os.environ["STAGEGRAPH_CONFIG"] = str(machine.folder / "config.yaml")
    cpu = min(measure(machine.folder, "run")[0] for _ in range(5))
    code = "import sys; from stagegraph.cli.main import dispatch; dispatch(['run', '-q']); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=machine.folder, capture_output=True, text=True, check=True
    )
    foreign = len(OF_REMOTES.intersection(loaded.stdout.split()))
    yield "run without news, CPU s", cpu, *yardstick.judge(cpu, NO_OP_SECONDS, yardstick.import_seconds())
    yield "modules of remotes and clusters in it", foreign, "0", foreign == 0


def main() -> int:
    """Print a row for each figure; return how many bounds were missed, at most one."""
    rows = {each.__name__: each for each in (second, damaged, dead, no_op)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--only", nargs="+", choices=rows, default=list(rows))
    args = parser.parse_args()
    missed = 0
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}", flush=True)
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            for what, figure, bound, met in rows[name](Path(folder), args.mib):
                missed += not met
                print(f"{what:50} {figure:10.2f}  {bound}{'' if met else ' MISSED'}", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
