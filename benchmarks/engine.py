"""What the engine itself costs; every figure is a ratio or a bound, taken in one run on one machine.

Usage: python benchmarks/engine.py [--runs N] [--keep DIR]   (exit status 1 if a figure is missed)

Measured: a fully cached run of the default pipeline against ``python -c "import yaml, diskcache"`` and its imports; the
same with a 4 GiB file among the sources; a touched source; a pipeline of 1,000 nodes; digesting 1 GiB against md5.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import yardstick

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = [sys.executable, "-m", "stagegraph.cli.main"]
IMPORTS = [sys.executable, "-c", "import yaml, diskcache"]
FORBIDDEN = ("tvm", "torch", "transformers", "networkx", "numpy", "tokenizers", "tiktoken", "rich")
GIB = 1 << 30


@dataclass
class Figure:
    """One measured figure and what it must reach."""

    what: str
    measured: str
    required: str
    met: bool


def quietly(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> None:
    """Run a command that must succeed and whose output does not matter."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, cwd=cwd, check=True, env={**os.environ, **(env or {})}, **quiet)


def cpu_seconds(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> float:
    """Run a command and return the user and system seconds it took, children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    quietly(command, cwd, env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def copy_project(folder: Path) -> Path:
    """Copy what the default pipeline needs, so that the project's own artifacts stay out of it."""
    for name in ("pipeline.yaml", "examples"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy2(source, folder / name)
    return folder


def cached_run(folder: Path, runs: int) -> list[Figure]:
    """The default pipeline, everything a hit, against the imports it cannot do without."""
    run = [*PIPELINE, "run", "pipeline.yaml"]
    ours, base = [], []
    for _ in range(runs):  # in turn, so that drift of the machine hits both
        base.append(cpu_seconds(IMPORTS, folder))
        ours.append(cpu_seconds(run, folder))
    mine, floor = statistics.median(ours), statistics.median(base)
    shown = f"{mine:.3f} s (min {min(ours):.3f}), {mine / floor:.2f} x imports ({floor:.3f} s)"
    return [
        Figure("fully cached run, CPU", shown, *yardstick.judge(mine, 0.10, floor)),
        Figure("  against import yaml, diskcache", f"{mine / floor:.2f} x", "<= 2.5 x", mine <= 2.5 * floor),
    ]


def imports(folder: Path) -> Figure:
    """What a fully cached run loads."""
    code = (
        "import sys; from stagegraph.cli.main import dispatch; dispatch(['run', 'pipeline.yaml']);"
        f"print(','.join(m for m in {FORBIDDEN!r} if m in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    loaded = done.stderr.strip()
    return Figure("heavy modules in a cached run", loaded or "none", "none", not loaded)


def large_source(folder: Path, runs: int) -> Figure:
    """A cached run whose checkpoint has a 4 GiB file more, which no tensor names but which the sources cover."""
    checkpoint = folder / "large"
    checkpoint.mkdir()
    with (checkpoint / "a.safetensors").open("wb") as file:
        block = os.urandom(16 << 20)
        for _ in range(4 * GIB // len(block)):
            file.write(block)
    (checkpoint / "b.safetensors").write_bytes(os.urandom(1 << 10))
    package(folder, nodes=0)
    env = fake_env(folder)
    times = {}
    for name, pattern in (("4 GiB", "a.safetensors"), ("1 KiB", "b.safetensors")):
        (folder / "large.yaml").write_text(
            f"version: 1\nname: large\nstages: {{fake: {{with: {{source: large/{pattern}}}}}}}\n", encoding="utf-8"
        )
        command = [*fake_pipeline(), "run", "large.yaml"]
        quietly(command, folder, env)
        time.sleep(0.1)
        quietly(command, folder, env)
        times[name] = statistics.median(cpu_seconds(command, folder, env) for _ in range(runs))
    (checkpoint / "a.safetensors").unlink()
    ratio = times["4 GiB"] / times["1 KiB"]
    return Figure("cached run: source of 4 GiB against 1 KiB", f"{ratio:.2f} x", "<= 1.25 x", ratio <= 1.25)


def touched(folder: Path) -> list[Figure]:
    """A touched shard is digested once; the run after that is a plain cached run."""
    shard = next((folder / "examples" / "tiny-qwen").glob("*.safetensors"))
    code = (
        "import sys; from stagegraph.planning import sources; from stagegraph.cli.main import dispatch; seen = [];"
        "real = sources.digest_file; sources.digest_file = lambda *a: (seen.append(a[0]), real(*a))[1];"
        "dispatch(['run', 'pipeline.yaml']); print(len(seen), file=sys.stderr)"
    )
    time.sleep(0.1)
    os.utime(shard)
    time.sleep(0.1)
    counts = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
        counts.append((int(done.stderr.strip().splitlines()[-1]), "BUILT" in done.stdout or "UNCHANGED" in done.stdout))
    ran = any(flag for _, flag in counts)
    digested = [count for count, _ in counts]
    return [
        Figure("touched source: files digested, then again", str(digested), "[1, 0]", digested == [1, 0]),
        Figure("touched source: nodes run", "some" if ran else "none", "none", not ran),
    ]


FAKE = '''
    """A stage that costs nothing."""
    from __future__ import annotations
    from dataclasses import dataclass
    from stagegraph.stage import Context, In, Out, Source, Stage, param, source

    class Fake(Stage):
        """Writes its number."""
        id = "fake"

        @dataclass(frozen=True)
        class Params:
            """Parameters."""
            number: int = param("a number", default=0)
            source: Source = source("a file", include=("*",), optional=True)

        inputs = {"before": In("fake", "out", "what came before", many=True, optional=True)}
        outputs = {"out": Out("out.txt", "the number")}

        def run(self, ctx: Context) -> None:
            (ctx.out / "out.txt").write_text(str(ctx.params.number))
'''


def package(folder: Path, nodes: int) -> None:
    """Write the fake stage, and a pipeline of chains of ten nodes."""
    (folder / "fakes").mkdir(exist_ok=True)
    (folder / "fakes" / "__init__.py").write_text("", encoding="utf-8")
    (folder / "fakes" / "fake.py").write_text(textwrap.dedent(FAKE), encoding="utf-8")
    lines = ["version: 1", "name: many", "stages:"]
    for i in range(nodes):
        needs = f"needs: [s{i - 1}], " if i % 10 else ""
        lines.append(f"  s{i}: {{uses: fake, {needs}with: {{number: {i}}}}}")
    (folder / "many.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def fake_pipeline() -> list[str]:
    """Return the command with the fake stage registered."""
    code = (
        "from stagegraph import registry;"
        "registry.shipped = lambda: registry.Provider(stages={'fake': 'fakes.fake:Fake'});"
        "from stagegraph.cli.main import main; main()"
    )
    return [sys.executable, "-c", code]


def fake_env(folder: Path) -> dict[str, str]:
    """Return the environment that lets workers find the fake stage."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def thousand_nodes(folder: Path) -> list[Figure]:
    """Planning and status of 1,000 nodes, before and after they were built."""
    package(folder, nodes=1000)
    env = fake_env(folder)
    plan = cpu_seconds([*fake_pipeline(), "run", "many.yaml", "--dry-run"], folder, env)
    quietly([*fake_pipeline(), "run", "many.yaml"], folder, env)
    status = cpu_seconds([*fake_pipeline(), "status", "many.yaml"], folder, env)
    return [
        Figure("1,000 nodes: planning, CPU", f"{plan:.2f} s", "< 1 s", plan < 1),
        Figure("1,000 nodes: status of all hits, CPU", f"{status:.2f} s", "< 1 s", status < 1),
    ]


def digest_throughput(folder: Path) -> Figure:
    """Our digest against md5 on the same 1 GiB file in the page cache."""
    from stagegraph.digest import digest_file

    path = folder / "gib"
    with path.open("wb") as file:
        block = os.urandom(16 << 20)
        for _ in range(GIB // len(block)):
            file.write(block)
    ours, md5 = [], []
    for _ in range(3):
        began = time.perf_counter()
        digest_file(path)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        with path.open("rb") as file:
            hashlib.file_digest(file, "md5")
        md5.append(time.perf_counter() - began)
    path.unlink()
    ratio = statistics.median(md5) / statistics.median(ours)
    return Figure(
        "digest of 1 GiB against md5", f"{1 / statistics.median(ours):.2f} GiB/s, {ratio:.1f} x", ">= 4 x", ratio >= 4
    )


def main() -> int:
    """Measure everything, print the table, say whether all is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each command")
    parser.add_argument("--keep", type=Path, help="work here and leave it; default: a temporary directory")
    args = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's Python keeps its byte code
    folder = args.keep or Path(tempfile.mkdtemp(prefix="stagegraph-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        copy_project(folder)
        quietly([*PIPELINE, "run", "pipeline.yaml"], folder)
        time.sleep(0.1)
        quietly([*PIPELINE, "run", "pipeline.yaml"], folder)
        figures = [*cached_run(folder, args.runs), imports(folder), *touched(folder)]
        figures += [*thousand_nodes(folder), large_source(folder, args.runs), digest_throughput(folder)]
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    width = max(len(f.what) for f in figures)
    for f in figures:
        print(f"{f.what:<{width}}  {f.measured:<52} {f.required:<10} {'met' if f.met else 'MISSED'}")
    return 0 if all(f.met for f in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
