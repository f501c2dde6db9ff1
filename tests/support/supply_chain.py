"""Reads the dependencies of the project from the metadata of what is installed: names, versions, licences.

``python -m tests.support.supply_chain > constraints.txt`` writes the lock file for continuous integration: the exact
versions, direct and indirect, of an environment in which the whole suite passed, for ``pip install -c
constraints.txt``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "constraints.txt"
EXTRAS = ("plot", "test")  # cuda is a set of exact releases of its own
HEAD = (
    "# Exact versions for continuous integration; made by `python -m tests.support.supply_chain > constraints.txt`.\n"
)


def canonical(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct() -> list[Requirement]:
    """Return what ``pyproject.toml`` asks for, with what the extras bring that an extra of its own names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, found = [*EXTRAS], list(map(Requirement, project["dependencies"]))
    for extra in extras:  # which grows
        for needed in map(Requirement, project["optional-dependencies"][extra]):
            if needed.name != project["name"]:
                found.append(needed)
            else:
                extras += sorted(needed.extras - {*extras})
    return found


def closure() -> dict[str, Distribution]:
    """Return everything that is installed of it, directly and indirectly, by canonical name."""
    found: dict[str, Distribution] = {}
    todo = direct()
    while todo:
        needed = todo.pop()
        name = canonical(needed.name)
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        todo += _needs(found[name], needed.extras)
    return found


def _needs(package: Distribution, extras: set[str]) -> Iterator[Requirement]:
    for needed in map(Requirement, package.requires or ()):
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield needed


def locked() -> dict[str, str]:
    """Return the lock file: name -> version."""
    lines = LOCK.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def main() -> None:
    """Print the lock file of this environment."""
    lines = [f"{name}=={package.version.partition('+')[0]}" for name, package in sorted(closure().items())]
    print(HEAD + "\n".join(lines))


if __name__ == "__main__":
    main()
