"""``pipeline show NODE --OPTION NAME``: follows one name through the inputs and outputs of a node.

A :class:`~stagegraph.registry.Provider` declares such options as ``lookups``; the module of one answers from the parsed
documents.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stagegraph.cli.common import print_json
from stagegraph.cli.pager import page
from stagegraph.errors import PlanError, StoreError
from stagegraph.registry import Lookup, find, names
from stagegraph.store.objects import RottenError
from stagegraph.store.record import artifact_digest

if TYPE_CHECKING:
    from stagegraph.api import Pipeline
    from stagegraph.planning.dag import Node
    from stagegraph.stage import JsonObject
    from stagegraph.store.record import FileEntry, Record

SHOWN = 3  # names like the one that is not known


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    for option in names("lookups"):
        lookup = find("lookups", option)
        parser.add_argument(f"--{option}", metavar="NAME", help=f"of {lookup.stage}: {lookup.doc}")


def asked(args: argparse.Namespace) -> str | None:
    """Return the look-up option given on the command line, if any."""
    return next((option for option in names("lookups") if getattr(args, option) is not None), None)


def run(args: argparse.Namespace, work: Pipeline, records: Mapping[Node, Record], option: str) -> None:
    """Print what the option's module finds under the name in each node."""
    lookup, name = find("lookups", option), getattr(args, option)
    module = importlib.import_module(lookup.module)
    found = {}
    for node, record in records.items():
        if node.stage.id != lookup.stage:
            raise PlanError(f"{node.name}: --{option} asks about {lookup.stage}; name a node of that stage")
        documents = _documents(work, node, record, lookup)
        found[node.name] = module.find(documents, name)
        if found[node.name] is None:
            raise PlanError(f"{node.name}: nothing is named '{name}'{_like(name, module.names(documents))}")
    if args.json:
        print_json(found)
    else:
        page("\n\n".join(f"-- {node} --\n{module.page(entry)}" for node, entry in found.items()))


def _documents(work: Pipeline, node: Node, record: Record, lookup: Lookup) -> JsonObject:
    """Return the JSON of the lookup's output port, and of its input ports where what was read is what there is."""
    documents = {lookup.output: _read(work, node.name, record["outputs"][lookup.output]["files"])}
    for port in lookup.inputs:
        (upstream,) = node.inputs[port]
        last = work.workspace.last_record(work.name, upstream.name)
        files = last["outputs"][node.stage.inputs[port].port]["files"] if last else {}
        if artifact_digest(files) == record["document"]["inputs"][port]:
            documents[port] = _read(work, upstream.name, files)
    return documents


def _read(work: Pipeline, node: str, files: Mapping[str, FileEntry]) -> Any:
    ((name, (digest, _)),) = files.items()
    try:
        return json.loads(work.workspace.store.read(digest))
    except RottenError:
        raise StoreError(f"{node}: {name} is damaged or missing in the store; `pipeline run` rebuilds it") from None


def _like(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = [each for each in names if name in each] or difflib.get_close_matches(name, names, n=SHOWN, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(each) for each in close[:SHOWN])}?" if close else ""
