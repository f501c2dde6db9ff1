"""Reads a pipeline file into a :class:`~stagegraph.spec.model.PipelineSpec`; the entry point of this room.

1. files: the file and those it extends, overlaid (``reader``, ``layers``);
2. variables: overridden by ``--set`` (``settings``), then resolved (``scope``);
3. entries: keys, stages, needs, cycles (``entries``, ``cycles``);
4. nodes: instances and typed parameters (``matrix``, ``nodes``, ``params``).
All problems that these steps find are reported together, sorted by place.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from stagegraph.errors import nearest
from stagegraph.files import path_name
from stagegraph.spec.entries import read_entries
from stagegraph.spec.item import Item, Problems, Reads
from stagegraph.spec.layers import read_layers, shown
from stagegraph.spec.matrix import NODES_LIMIT
from stagegraph.spec.model import NodeSpec, PipelineSpec, Place
from stagegraph.spec.nodes import expand
from stagegraph.spec.remotes import read_remotes
from stagegraph.spec.scope import Scope
from stagegraph.spec.settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stagegraph.spec.settings import Setting

VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_EXPECTED = {
    "version": f"'version: {VERSION}'",
    "name": "a name, under which the artifacts are stored",
    "stages": "a mapping of entries",
}
TOP_KEYS = ("version", "name", "extends", "vars", "defaults", "remotes", "stages")


def load(
    path: Path, overrides: Sequence[str] = (), env: Mapping[str, str] = os.environ, *, reads: Reads | None = None
) -> PipelineSpec:
    """Return the pipeline that the file at ``path`` describes.

    ``overrides`` are settings of variables and parameters (:mod:`stagegraph.spec.settings`); ``env`` is what
    ``${env.X}`` reads. Relative sources become absolute: from the directory of the file they are written in, or from
    the working directory for overrides and ``env``. Whether they exist is not checked here. A name that a variable
    gives as a path is that of its last folder. Raises :class:`SpecError` with every problem
    found. ``reads`` is told what was read.
    """
    problems = Problems(reads)
    top = read_layers(path, problems)
    for key, item in top.items():
        if key not in TOP_KEYS:
            problems.add(item.named_at, f"unknown key '{key}'{nearest(key, TOP_KEYS)}")
    for key, expected in _EXPECTED.items():
        if key not in top:
            problems.add(Place(shown(path), 1, 1), f"missing key '{key}'; expected {expected}")
    scope = Scope(env, problems)
    variables = problems.mapping(top["vars"], "vars") if "vars" in top else {}
    entries = top["stages"].value if "stages" in top and isinstance(top["stages"].value, dict) else {}
    settings = read_settings(overrides, variables or {}, entries, problems)
    scope.define(settings.variables)
    _check_version(top.get("version"), problems)
    name = _name(top.get("name"), scope, problems)
    nodes = _nodes(top, path.absolute().parent, scope, settings.parameters, problems)
    remotes = tuple(read_remotes(top.get("remotes"), problems, scope.resolve))
    problems.check()
    return PipelineSpec(name, path.absolute(), tuple(nodes), remotes, scope.variables)


def _check_version(item: Item | None, problems: Problems) -> None:
    if item is not None and (item.value != VERSION or not isinstance(item.value, int) or isinstance(item.value, bool)):
        problems.unexpected(item, f"{VERSION}, the only version of the format there is", "version")


def _name(item: Item | None, scope: Scope, problems: Problems) -> str:
    resolved = scope.resolve(item) if item is not None else None
    if resolved is None:
        return ""
    text = resolved.value
    if isinstance(text, str) and resolved is not item and (os.sep in text or text in {".", ".."}):
        path = text if "://" in text else problems.reads.absolute(resolved.base / text)
        text = path_name(path)  # of a variable that holds a path or a URL
    if isinstance(text, str) and NAME.fullmatch(text):
        return text
    problems.unexpected(
        resolved, "a safe file name: letters, digits, '.', '_' and '-', starting with a letter or digit", "name"
    )
    return ""


def _nodes(
    top: Mapping[str, Item], folder: Path, scope: Scope, parameters: Sequence[Setting], problems: Problems
) -> list[NodeSpec]:
    item = top.get("stages")
    stages = problems.mapping(item, "stages") if item is not None else None
    if not stages:
        if item is not None and stages is not None:
            problems.unexpected(item, _EXPECTED["stages"], "stages")
        return []
    entries = read_entries(stages, folder, scope, parameters, problems, defaults=top.get("defaults"))
    nodes = []
    for node in (node for entry in entries for node in expand(entry, scope, problems)):
        nodes.append(node)
        if len(nodes) > NODES_LIMIT:
            problems.add(node.place, f"is the entry that makes more than {NODES_LIMIT:,} nodes of the pipeline")
            break
    return nodes
