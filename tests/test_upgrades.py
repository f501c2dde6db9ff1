"""Stores of other versions: what an earlier one wrote is read, what a newer one wrote is refused, never misread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagegraph.digest import digest_json
from stagegraph.store.index import Index
from stagegraph.store.journal import SEAL_DIGITS, Journal
from stagegraph.store.record import RECORD_SCHEMA
from tests.endurance.bench import Bench
from tests.support.archives import unpack

STORES = Path(__file__).parent / "data" / "stores"


def unpacked(archive: Path, folder: Path) -> Bench:
    bench = Bench(folder)
    unpack(archive, folder)
    return bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return unpacked(STORES / f"schema-{RECORD_SCHEMA}.tar.gz", tmp_path / "w")


@pytest.mark.parametrize("archive", sorted(STORES.glob("schema-*.tar.gz")), ids=lambda path: path.name)
def test_a_store_of_an_earlier_version_is_read(archive: Path, tmp_path: Path) -> None:
    bench = unpacked(archive, tmp_path / "w")
    shown = bench.shown()
    assert shown["lab/lab-read/words.txt"].startswith("9fd6e438")
    assert "3 words" in bench("show", "lab-read").stdout
    assert bench.here("runs").count(" ok ") == 2
    assert "read was here" in bench("log", "lab-read").stdout
    assert bench.here("fsck").endswith("all intact\n")
    bench.run()
    assert bench.shown() == shown


def test_there_is_a_fixture_of_this_schema() -> None:
    assert (STORES / f"schema-{RECORD_SCHEMA}.tar.gz").exists(), "tests/data/stores/make.py writes it"


def test_records_of_a_newer_version_are_refused_and_left_alone(bench: Bench) -> None:
    index = Index(bench.store / "index")
    for key in sorted(bench.keys()):
        index.set(
            f"rec:{key}", index.get(f"rec:{key}") | {"schema": RECORD_SCHEMA + 1, "outputs": ["of another shape"]}
        )
    index.close()
    before = bench.kept()
    for argv in (["run"], ["status"], ["show", "lab-read"], ["gc"], ["fsck"], ["fsck", "--repair"]):
        ended = bench(*argv, code=3)
        assert "has results of a newer version of stagegraph" in ended.stderr, argv
        assert "use that version, or another directory" in ended.stderr
    assert {name for name in before if name.startswith(("records/", "objects/"))} <= bench.kept()


def test_lines_of_a_newer_journal_are_passed_over(bench: Bench) -> None:
    path = bench.store / "journal.jsonl"
    entries = list(Journal(path).entries())
    newer = {"schema": 2, "runs": []}
    sealed = newer | {"seal": digest_json(newer)[:SEAL_DIGITS]}
    path.write_text(path.read_text() + json.dumps(sealed) + "\n")
    assert list(Journal(path).entries()) == entries
    assert bench.here("runs").count(" ok ") == 2
