"""Write the fixture of a store of this version: ``python tests/data/stores/make.py`` from the root, once a schema.

``schema-N.tar.gz`` is a directory with a pipeline and its ``artifacts/``, built by the version of that time. It stays
as it is for ever: later versions read it, or refuse it and say what to do.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from stagegraph.store.record import RECORD_SCHEMA  # noqa: E402 - after the path
from tests.endurance.bench import Bench  # noqa: E402

PIPELINE = """\
version: 1
name: lab
vars: {tag: x}
stages:
  lab-read: {with: {text: words, tag: "${vars.tag}"}}
  lab-cut: {needs: [lab-read], with: {which: a}}
"""


def main() -> None:
    """Build the pipeline twice, with a result of an earlier run, and pack it."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "w", PIPELINE)
        bench.run("--set", "vars.tag=y")
        bench.run()
        bench.notes.unlink()
        with tarfile.open(Path(__file__).with_name(f"schema-{RECORD_SCHEMA}.tar.gz"), "w:gz") as archive:
            archive.add(bench.folder, ".")


if __name__ == "__main__":
    main()
