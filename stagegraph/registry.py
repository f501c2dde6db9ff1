"""Providers: records by which packages add stages, verbs, report sections and comparisons to the engine.

A provider is a record of strings, so that naming a stage imports nothing. The one that is shipped is known by
``SHIPPED``; any installed package adds its own by an entry point of the group ``stagegraph.providers`` that names a
:class:`Provider`. Those are looked up only where names are listed, and for a name that the shipped one lacks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stagegraph.errors import PipelineError

if TYPE_CHECKING:
    from stagegraph.stage import Stage

SHIPPED = "stages.provider:PROVIDER"
GROUP = "stagegraph.providers"


class Lookup(NamedTuple):
    """An option of ``show``: the stage it asks about, the ports whose JSON is read, and the module that answers.

    The module has ``find(documents, name)``, ``names(documents)`` and ``page(found)``; documents are by port.
    """

    stage: str
    output: str
    inputs: tuple[str, ...]
    module: str
    doc: str


class Verb(NamedTuple):
    """A verb of the command line: the module with ``add_arguments`` and ``run``, and a line of help.

    Those of its arguments that the module lists in ``REFERENCES`` may name a node in place of a path; ``run`` then gets
    the path of a folder.
    """

    module: str
    doc: str


class Plot(NamedTuple):
    """What ``show --plot`` draws of a stage's result: a JSON file of it, and the function that does.

    The function takes the document and the file to draw into; what it cannot draw is a ValueError.
    """

    file: str
    function: str


class Section(NamedTuple):
    """A view of a stage's results that ``report`` shows on its own, before all nodes, the heading above it and a remark
    below that.
    """

    title: str
    view: str
    note: str = ""


class Comparison(NamedTuple):
    """How ``compare`` compares several results of a stage: the JSON files that it reads, and the module that does.

    ``files`` are those of the result itself, and of the stages that have read it: stage -> names. The module has
    ``row(documents)``, plain values of what is known of one result, whose documents are by name, ``page(rows)`` of
    label -> row as Markdown, and ``draw(rows, path)``, of which what cannot be drawn is a ValueError.
    """

    files: Mapping[str, Sequence[str]]
    module: str


class Starter(NamedTuple):
    """What ``init`` and ``build`` use: the module that writes a first pipeline file for one kind of source.

    That kind, the starter's name, is also the variable of such files that holds its path. The module has
    ``add_arguments(parser)``, ``settings(args)``, the variables that were asked for, ``named(text)``, the path or URL
    that is meant, ``examine(path)``, of which what cannot be begun with is a ValueError, and ``compose(path, examined,
    settings, folder)``, the text of the file in a folder. ``exports`` is the stage whose results ``build`` writes out,
    ``then`` are verbs to go on with there.
    """

    module: str
    exports: str
    doc: str
    then: Sequence[str] = ()


@dataclass(frozen=True)
class Provider:
    """Stages, verbs and so on that one package provides, each by its name; objects are named as ``"module:NAME"``."""

    stages: Mapping[str, str] = field(default_factory=dict)  # id -> class
    # Kind of worker -> what such a process calls before it runs stages; "" for nothing.
    profiles: Mapping[str, str] = field(default_factory=dict)
    # Environment variables that change what the stages make and that no key sees: workers do not get them.
    hidden_variables: frozenset[str] = frozenset()
    verbs: Mapping[str, Verb] = field(default_factory=dict)
    starters: Mapping[str, Starter] = field(default_factory=dict)
    lookups: Mapping[str, Lookup] = field(default_factory=dict)  # option of ``show`` -> what answers it
    # Stage -> the function that says what differs inside two of its results (:data:`stagegraph.query.diff.Comparer`).
    comparers: Mapping[str, str] = field(default_factory=dict)
    # Suffix of a source file -> the function that says which of its parts changed:
    # (recall, digest before, path now) -> text or None.
    file_diffs: Mapping[str, str] = field(default_factory=dict)
    plots: Mapping[str, Plot] = field(default_factory=dict)  # by stage
    # Stage -> what ``report`` draws of its result: the function takes the document and returns figures with SVG.
    charts: Mapping[str, Plot] = field(default_factory=dict)
    sections: Mapping[str, Sequence[Section]] = field(default_factory=dict)  # by stage
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)  # by stage
    # Scheme of a URL that a source may be -> the module that brings its files (:mod:`stagegraph.planning.urls`).
    sources: Mapping[str, str] = field(default_factory=dict)


class Origin(NamedTuple):
    """Where a stage comes from, so that another process can make it too: ``"module:NAME"`` of its class.

    ``folder`` is that of the pipeline file for a class in a file beside it (:mod:`stagegraph.local`); ``arguments`` are
    what the class, or a function in its place, is called with.
    """

    reference: str
    folder: str = ""
    arguments: Sequence[Any] = ()

    @property
    def module(self) -> str:
        """The module in which the code that the stage reaches begins."""
        return self.reference.partition(":")[0]

    def make(self) -> Stage:
        """Return an instance of the stage."""
        if self.folder:
            from stagegraph.local import load_class

            made: Stage = load_class(self.folder, self.reference)()
        else:
            made = load_object(self.reference)(*self.arguments)
        return made


# A stage needs no preparation unless it says so.
OWN = Provider(profiles={"light": ""}, sources=dict.fromkeys(("http", "https", "s3"), "stagegraph.remote.web"))


@functools.cache
def shipped() -> Provider:
    """Return the provider that comes with the engine."""
    found: Provider = load_object(SHIPPED)
    return found


@functools.cache
def installed() -> Mapping[str, Provider]:
    """Return the providers of other packages by entry point; :class:`PipelineError` for one that is no provider."""
    if not any(_declaring()):  # by far the most often
        return {}
    from importlib.metadata import entry_points

    found = {}
    for point in sorted(entry_points(group=GROUP)):
        try:
            provider = load_object(point.value)
        except Exception as error:  # noqa: BLE001 - another's module; anything may be in it
            raise PipelineError(f"the provider '{point.name}' ({point.value}) cannot be loaded: {error}") from None
        if not isinstance(provider, Provider):
            raise PipelineError(f"the provider '{point.name}' ({point.value}) is no stagegraph.registry.Provider")
        found[point.name] = provider
    return found


def _declaring() -> Iterator[Path]:
    """Yield the files by which installed packages have a provider, without the 50 ms of importlib.metadata."""
    for folder in map(Path, filter(os.path.isdir, sys.path)):
        for name in os.listdir(folder):  # noqa: PTH208 - on the path of every command that lists names
            if name.endswith((".dist-info", ".egg-info")):
                with contextlib.suppress(OSError):
                    if GROUP in (folder / name / "entry_points.txt").read_text(encoding="utf-8", errors="replace"):
                        yield folder / name


def find(table: str, name: str) -> Any:
    """Return what some provider has under ``name`` in one of its tables, or None; two that do are an error."""
    for provider in (OWN, shipped()):
        if name in getattr(provider, table):
            return getattr(provider, table)[name]
    tables = {who: getattr(provider, table) for who, provider in installed().items()}
    found = {who: rows[name] for who, rows in tables.items() if name in rows}
    if len(found) > 1:
        raise PipelineError(f"'{name}' is among the {table} of more than one provider: {', '.join(found)}; remove one")
    return next(iter(found.values()), None)


def names(table: str) -> list[str]:
    """Return every name that some provider has in a table."""
    return sorted({name for provider in _all() for name in getattr(provider, table)})


def hidden_variables() -> frozenset[str]:
    """Return the variables that workers do not get."""
    return frozenset().union(*(provider.hidden_variables for provider in _all()))


def _all() -> Iterable[Provider]:
    return (OWN, shipped(), *installed().values())


def load_module(name: str) -> Any:
    """Import what a provider named, and return the module."""
    return importlib.import_module(name)


def load_object(reference: str) -> Any:
    """Import ``"module:NAME"`` and return the object."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def stage_reference(stage_id: str) -> str:
    """Return ``"module:Class"`` of a stage id; :class:`KeyError` if nobody provides it."""
    reference: str | None = find("stages", stage_id)
    if reference is None:
        raise KeyError(stage_id)
    return reference


@functools.cache
def get_stage(stage_id: str) -> Stage:
    """Return the one instance of a stage; :class:`KeyError` if nobody provides it."""
    stage: Stage = load_object(stage_reference(stage_id))()
    if stage.id != stage_id:
        raise PipelineError(
            f"{stage_reference(stage_id)}: provides stage '{stage.id}' but is registered as '{stage_id}'"
        )
    return stage
