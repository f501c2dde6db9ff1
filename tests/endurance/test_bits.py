"""Damage to any file under ``artifacts/``: found before it reaches a result, and healed, or refused with what to do.

After each damage a run makes new results out of what is kept: it reads records, lays objects out for stages, recalls
parts, digests a secret and restores what is shown. Those results are compared with values computed here.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random

import pytest

from stagegraph import registry
from stagegraph.cli.main import main
from tests.endurance.bench import LIB, PIPELINE, Bench

SEALED = """\
  sealed:
    uses: shell
    with:
      cmd: "cat ${in.words}/text | wc -c > ${out.size}; printf %s $GLUE | wc -c >> ${out.size}"
      inputs: {words: lab-join.joined}
      outputs: {size: size.txt}
      env: {GLUE: "${secret.LAB_GLUE}"}
"""
GLUE = "=glue="
WORDS = "some words here\nx"
SMALL = 4096  # bytes of a file of which every one is flipped
SPREAD = 24  # positions in a larger file
MOST = int(os.environ.get("STAGEGRAPH_BITS", str(SMALL)))  # flips of one file: fewer where time is short
# Kind -> which files under artifacts/ are of it. Whatever else appears there fails the test below.
KINDS = {
    "object": r"\.stagegraph/objects/../[0-9a-f]{64}",
    "record": r"\.stagegraph/records/../[0-9a-f]{64}",
    "part": r"\.stagegraph/parts/../[0-9a-f]{64}",
    "index": r"\.stagegraph/index/cache\.db(-wal|-shm)?",
    "log": r"\.stagegraph/logs/../[0-9a-f]{64}\.log",
    "lock": r"\.stagegraph/locks/.+",
    "journal": r"\.stagegraph/journal\.jsonl",
    "secret": r"\.stagegraph/secret\.key",
    "view": r"lab/[^/]+/views/.+",
    "output": r"lab/(?!lab-cut\.n|[^/]+/views/).+",
    "output of another run": r"lab/lab-cut\.n.+",
    "note for version control": r"(\.stagegraph/)?(\.gitignore|CACHEDIR\.TAG)",
}
Damage = Callable[[Path], None]


def ask(bench: Bench, verb: str, *argv: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it said."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as end:
        main([verb, str(bench.folder / "pipeline.yaml"), *argv])
    return int(end.value.code or 0), out.getvalue()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.syspath_prepend(str(LIB))
    monkeypatch.setenv("LAB_GLUE", GLUE)
    registry.installed.cache_clear()
    built = Bench(tmp_path / "w", PIPELINE + SEALED)
    code, said = ask(built, "run", "-j", "1")
    assert code == 0, said
    yield built
    registry.installed.cache_clear()


def kinds(bench: Bench) -> dict[str, list[Path]]:
    """Every file under ``artifacts/`` by its kind; what is of none is under ``""``."""
    root = bench.folder / "artifacts"
    found: dict[str, list[Path]] = {}
    for folder, _, names in os.walk(root):
        for name in sorted(names):
            path = Path(folder, name)
            inside = path.relative_to(root).as_posix()
            kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, inside)), "")
            found.setdefault(kind, []).append(path)
    return found


def joined(glue: str, which: list[str]) -> str:
    """What lab-join makes of sound inputs."""
    pieces = [
        repr(sorted({"i": i, "words": WORDS, "which": name if i % 2 else "all"}.items())) * 50
        for name in which
        for i in range(4)
    ]
    return glue.join([WORDS, *pieces])


def flip(bit: int) -> Damage:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

    return damage


def cut(size: int) -> Damage:
    return lambda path: os.truncate(path, size)


def replace(path: Path) -> None:
    path.unlink()
    (path / "x").mkdir(parents=True)


def damages(size: int, rng: Random) -> Iterator[tuple[str, Damage]]:
    """Yield everything that can happen to a file of so many bytes."""
    places = range(size) if size <= SMALL else sorted({0, size - 1, *rng.sample(range(size), SPREAD)})
    places = sorted(rng.sample(places, min(MOST, len(places))))
    for place in places:
        yield f"bit {place * 8 + place % 8}", flip(place * 8 + place % 8)
    for length in {0, size // 2, size - 1} - {size}:
        yield f"cut to {length}", cut(max(length, 0))
    yield "deleted", Path.unlink
    yield "mode 0", lambda path: path.chmod(0)
    yield "mode 777", lambda path: path.chmod(0o777)
    yield "a directory", replace


def trial(bench: Bench, path: Path, damage: Damage, number: int) -> str:
    """Damage a file that may be in use by no one, make new results, and say how it ended."""
    before = bench.shown()
    writable = path.stat().st_mode | 0o200
    path.chmod(writable)
    damage(path)
    which = ["a", "b", f"n{number}"]
    new = ("run", "-j", "1", "--set", f"vars.which=[{','.join(which)}]")
    code, said = ask(bench, *new)
    ended = "healed"
    if code == 3:
        ended = "refused"
        assert re.search(r"remove it|fsck --repair|delete|another directory", said), said
        if path.is_dir():
            shutil.rmtree(path)
        elif "remove it" in said or "delete" in said:
            path.unlink()
        ask(bench, "fsck", "--repair")
        code, said = ask(bench, *new)
    assert (code, "Traceback" in said) == (0, False), said
    shown = bench.folder / "artifacts" / "lab"
    text = (shown / "lab-join" / "joined" / "text").read_text()
    assert text == joined("-", which)
    assert [int(size) for size in (shown / "sealed" / "size.txt").read_text().split()] == [len(text), len(GLUE)]
    code, said = ask(bench, "run", "-j", "1")
    assert code == 0, said
    shown_now = bench.shown()
    assert {name: shown_now.get(name) for name in before} == before
    code, said = ask(bench, "fsck")
    if code:
        ask(bench, "fsck", "--repair")
        assert (again := ask(bench, "run", "-j", "1"))[0] == 0, again
        code, said = ask(bench, "fsck")
    assert code == 0, said
    return ended


def test_each_kind_of_file_damaged_once(bench: Bench) -> None:
    found = kinds(bench)
    assert not found.pop("", []), "files of no kind: say above what they are"
    assert set(KINDS) - set(found) <= {"note for version control", "output of another run"}
    shapes: list[Damage] = [flip(3), cut(1), Path.unlink, replace]
    for number, (kind, files) in enumerate(sorted(found.items())):
        path = next((path for path in files if path.stat().st_size > 1), files[0])
        damage = shapes[number % len(shapes)] if path.stat().st_size > 1 else Path.unlink
        assert trial(bench, path, damage, number), kind


@pytest.mark.endurance
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_to_every_kind_of_file(bench: Bench, kind: str) -> None:
    rng = Random(kind)
    ended: Counter[str] = Counter()
    wrong, number = [], 0
    sizes = sorted({path.stat().st_size for path in kinds(bench).get(kind, [])})
    for size in {*sizes[:1], *sizes[-1:]}:
        for name, damage in damages(size, rng) if size else [("deleted", Path.unlink)]:
            path = min(kinds(bench)[kind], key=lambda path: abs(path.stat().st_size - size))
            if path.stat().st_size < size and name.startswith(("bit", "cut")):
                continue
            number += 1
            try:
                ended[trial(bench, path, damage, number)] += 1
            except AssertionError as error:
                wrong.append(f"{name} of {path}: {error}"[:1500])
                print(wrong[-1], flush=True)
    print(f"{kind}: {number} damages, {dict(ended)}, {len(wrong)} wrong", flush=True)
    assert not wrong
