"""Finds the results that the pipeline files beside ``artifacts/`` need, and pipelines with results but without a file.

A pipeline that was renamed, or whose file was deleted, leaves results that nothing will ask for. The first ``gc`` that
finds no file for a name says so and marks it; a later one treats its results as earlier ones. While a file that may be
a pipeline cannot be read, any name may be its own, and nothing is marked or taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stagegraph.errors import PipelineError
from stagegraph.files import open_regular
from stagegraph.project import Project
from stagegraph.store.journal import HIT

if TYPE_CHECKING:
    from pathlib import Path

    from stagegraph.query.contents import Contents
    from stagegraph.store.workspace import Workspace

MARK = "gone:"  # in the index, before the name of a pipeline
# In any of the ways of YAML, which JSON is too.
PIPELINE = re.compile(rb"""(^|[{,])\s*["']?(stages|extends)["']?\s*:""", re.MULTILINE)


@dataclass
class Needs:
    """``keys`` of results that pipeline files need as they stand, the ``names`` of these pipelines, None if one of
    them cannot be read, and ``notes`` on what is not known.
    """

    keys: set[str] = field(default_factory=set)
    names: set[str] | None = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def needs(project: Project) -> Needs:
    """Return what the pipeline files beside ``artifacts/`` need; ``project`` is one of them, with its overrides."""
    found = Needs(names={project.name})
    _plan(found, project, "the pipeline")
    folder = project.workspace.artifacts.parent
    for path in sorted(folder.iterdir()):
        if path.suffix not in {".yaml", ".yml"} or not _may_be_pipeline(path):
            continue
        try:
            with Project(path) as other:
                if found.names is not None:
                    found.names.add(other.name)
                _plan(found, other, path.name)
        except PipelineError as error:
            found.names = None
            _unplanned(found, path.name, error)
    return found


def _plan(found: Needs, project: Project, name: str) -> None:
    try:
        decisions = project.planner.plan(project.dag.nodes)
    except PipelineError as error:
        _unplanned(found, name, error)
    else:
        found.keys |= {decision.key for decision in decisions if decision.status == HIT}


def _unplanned(found: Needs, name: str, error: PipelineError) -> None:
    note = f"{name} cannot be planned; only what artifacts/ shows of it is kept: {error.problems[0]}"
    found.notes.append(note)


def _may_be_pipeline(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return PIPELINE.search(file.read(1 << 20)) is not None
    except OSError:
        return True  # who knows


def gone(workspace: Workspace, names: set[str] | None, contents: Contents, *, mark: bool) -> tuple[set[str], list[str]]:
    """Return the pipelines without a file that an earlier call marked, and a note for each that has just been found.

    ``names`` are those of the files, None where not all are known; ``contents`` is what the store holds, and ``mark``
    writes down what was found.
    """
    if names is None:
        return set(), []
    marked = {name.removeprefix(MARK) for name in workspace.index.names(MARK)}
    lasts, records = contents.lasts.items(), contents.records
    shown = {name.partition("/")[0] for name, last in lasts if last.get("key") in records}
    fresh = sorted(shown - names - marked)
    if mark:
        workspace.index.set_all({f"{MARK}{name}": True for name in fresh})
        for name in marked & names:
            workspace.index.delete(f"{MARK}{name}")
    notes = [
        f"no pipeline file here is named '{name}': its results are kept this time, and the next gc treats them as "
        f"earlier ones; {workspace.artifacts.name}/{name} itself is left as it is"
        for name in fresh
    ]
    return marked - names, notes
