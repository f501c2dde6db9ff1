"""Dependencies: locked, of licences that may be shipped, and without the one danger that diskcache is known for."""

from __future__ import annotations

import ast
import os
import pickle
import sqlite3
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.endurance.bench import Bench
from tests.support.supply_chain import ROOT, canonical, closure, direct, locked

# Words of which one stands in the licence of everything that is installed: permissive, or copyleft for single files.
LICENCES = (
    "apache",
    "bsd",
    "mit",
    "mpl",
    "isc",
    "psf",
    "python software foundation",
    "cc0",
    "cnri-python",
    "hpnd",
    "epl",
    "unlicense",
)
FORBIDDEN = ("gpl", "agpl", "sspl", "proprietary", "commercial")


@pytest.mark.parametrize("needed", direct(), ids=str)
def test_the_ranges_contain_what_is_locked(needed: Requirement) -> None:
    version = locked()[canonical(needed.name)]
    assert needed.specifier.contains(version, prereleases=True), f"{needed} but {version} is locked"


def test_all_that_is_installed_is_locked() -> None:
    missing = closure().keys() - locked().keys()
    assert not missing, "python -m tests.support.supply_chain > constraints.txt"


def licence(package: Distribution) -> str:
    """What a package says of its licence: an SPDX expression, classifiers, the beginning of a text, or of a file."""
    told = package.metadata.get_all("Classifier") or []
    # get, as the package importlib_metadata, where some other test has imported it, raises for what is not there.
    said = [line for line in told if line.startswith("License ::")] or [package.metadata.get("License", "")[:100]]
    words = " ".join([package.metadata.get("License-Expression", ""), *said]).strip()
    files = package.metadata.get_all("License-File") or []
    return (words or " ".join((package.read_text(f"licenses/{name}") or "")[:100] for name in files)).lower()


@pytest.mark.parametrize(("name", "package"), sorted(closure().items()), ids=lambda each: str(each)[:30])
def test_the_licence_may_be_shipped(name: str, package: Distribution) -> None:
    given = package.metadata.get("License-Expression") or package.metadata.get("License", "")[:100]
    choices = given.lower().split(" or ") if " OR " in given else [licence(package)]  # of which we take one
    assert any(
        any(word in said for word in LICENCES) and not any(word in said for word in FORBIDDEN) for said in choices
    ), f"{name}: {choices}"


class Trap:
    """What creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self._path),)


def test_no_pickle_in_the_index_is_ever_loaded(tmp_path: Path) -> None:
    """diskcache unpickles values that are marked so; the index has none, and what somebody plants is not read."""
    sprung = tmp_path / "sprung"
    bench = Bench(tmp_path / "w")
    bench.run()
    bait = pickle.dumps(Trap(sprung))
    with sqlite3.connect(bench.store / "index" / "cache.db") as index:
        assert index.execute("SELECT count(*) FROM Cache WHERE mode = 4").fetchone() == (0,), "mode 4 is a pickle"
        index.execute("UPDATE Cache SET mode = 4, value = ?", (bait,))
        index.execute("INSERT INTO Cache (key, raw, mode, value) VALUES (?, 0, 4, ?)", (bait, bait))
    index.close()
    for verb in ("status", "du", "runs", "gc"):
        bench(verb, code=None)
    bench.run()
    bench("fsck", code=None)
    bench("fsck", "--repair", code=None)
    assert not sprung.exists()
    pickle.loads(bait)  # noqa: S301 - the trap is one
    assert sprung.exists()


@pytest.mark.parametrize("path", sorted((ROOT / "stagegraph").rglob("*.py")), ids=lambda path: path.stem)
def test_the_engine_imports_nothing_that_unpickles(path: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {getattr(node, "module", "") for node in imports}
    assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
