"""Caches the parsed pipeline file, for as long as nothing that it was read from has changed.

Reading YAML, and the modules that check it, take most of a run without news. What is kept in the index is what the file
came to, plain data, with all that it depended on: the text of the files, variables of the environment, where links led,
and every module that was loaded by then, of which any may declare a parameter or the names that it may have. So a stage
is never made of what another version of it declared. A pipeline that has a secret is not kept.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagegraph.digest import digest_bytes, digest_json, stat_id
from stagegraph.files import open_regular
from stagegraph.registry import Origin, get_stage, stage_reference
from stagegraph.spec.model import NodeSpec, Pipeline, Place, Resources
from stagegraph.stage import Source

if TYPE_CHECKING:
    from stagegraph.spec.item import Reads
    from stagegraph.stage import Stage
    from stagegraph.store.index import Index

SCHEMA = 1
SLOTS = 16  # files and settings that are kept side by side in one index
RACY_NS = 50_000_000  # a file changed this shortly before it was read may change again within one clock tick
SOURCE = "source"  # {SOURCE: path} is a parameter that names a source


def read_pipeline(file: Path, overrides: Sequence[str], index: Index) -> Pipeline:
    """Return what :func:`stagegraph.spec.load.load` does, from the index where nothing that counts has changed."""
    identity = [SCHEMA, str(file), os.getcwd(), list(overrides)]  # noqa: PTH109
    name = f"spec:{int(digest_json(identity)[:8], 16) % SLOTS}"
    kept = index.get(name)
    if isinstance(kept, dict) and kept.get("identity") == identity and _same(kept):
        pipeline = _restored(kept, file)
        if pipeline is not None:
            return pipeline
    from stagegraph.spec.item import Reads
    from stagegraph.spec.load import load

    reads = Reads()
    pipeline = load(file, overrides, reads=reads)
    document = _document(pipeline, reads)
    if document is not None:
        index.set(name, {"identity": identity, **document})
    return pipeline


# -- what it was read from -------------------------------------------------------------------------------------------


def _same(kept: Mapping[str, Any]) -> bool:
    """Say whether all is as it was; of modules it may be too soon to say."""
    try:
        files = {path: digest_bytes(_text(path)) for path in kept["files"]}
        stats = {name: [path, list(stat_id(path))] for name, (path, _) in kept["modules"].items()}
    except OSError:
        return False
    links = {path: os.path.realpath(path) for path in kept["links"]}
    env = _env_digest({name: os.environ.get(name) for name in kept["env"]})
    now = {"files": files, "links": links, "modules": stats}
    return all(kept[part] == found for part, found in now.items()) and kept["said"] == env and _settled(stats)


def _text(path: str) -> bytes:
    with open_regular(path) as file:
        return file.readall()


def _env_digest(env: Mapping[str, str | None]) -> str:
    return digest_json(env)


def _modules() -> dict[str, list[Any]]:
    """Return module -> [file, stat] of all that is loaded, but for the standard library."""
    library = f"{os.path.dirname(os.__file__)}{os.sep}"  # noqa: PTH120
    others = f"{library}site-packages{os.sep}"
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return {
        name: [path, list(stat_id(path))]
        for name, path in files.items()
        if path and name != "__main__" and (path.startswith(others) or not path.startswith(library))
    }


def _settled(modules: Mapping[str, Sequence[Any]]) -> bool:
    """Say whether this process has loaded the modules as their files are: none has changed since it began."""
    try:
        began = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return False
    # Whoever is interrupted between the two clocks has begun earlier by them, never later.
    began_ns = max(time.time_ns() - int((time.clock_gettime(time.CLOCK_BOOTTIME) - began) * 1e9) for _ in range(3))
    return all(max(stat[3:]) < began_ns - RACY_NS for _, stat in modules.values())


# -- as plain data ---------------------------------------------------------------------------------------------------


def _document(pipeline: Pipeline, reads: Reads) -> dict[str, Any] | None:
    """Return a pipeline with what it was read from, or None if it cannot be kept."""
    try:
        modules = _modules()
    except OSError:
        return None
    whole = all(not hasattr(type(node.params), "__post_init__") for node in pipeline.nodes)
    if not (reads.lasting and whole and _settled(modules)):
        return None
    writer = _Writer(pipeline)
    nodes = [writer.node(node) for node in pipeline.nodes]
    return {
        "files": {path: digest_bytes(data) for path, data in reads.files.items()},
        "links": reads.links,
        "env": list(reads.env),
        "said": _env_digest(reads.env),
        "modules": modules,
        "name": pipeline.name,
        "places": list(writer.files),
        "origins": writer.origins,
        "entries": list(writer.entries.values()),
        "nodes": nodes,
    }


class _Writer:
    """Makes lists of nodes; what those of an entry share, and the names of files, stand once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._folder = str(pipeline.root)
        self.files: dict[str, int] = {}
        self.origins: list[list[Any]] = []
        self._numbers: dict[str, int] = {}
        self.entries: dict[str, list[Any]] = {}
        self._order: dict[str, int] = {}

    def node(self, node: NodeSpec) -> list[Any]:
        if node.entry not in self.entries:
            needs = {name: self._place(place) for name, place in node.need_places.items()}
            self._order[node.entry] = len(self.entries)
            self.entries[node.entry] = [node.entry, self._origin(node), self._place(node.place), needs]
        values = {name: _plain(getattr(node.params, name)) for name in node.places}
        places = {name: self._place(place) for name, place in node.places.items()}
        return [self._order[node.entry], node.name, node.each, values, places, list(node.resources), node.timeout]

    def _place(self, place: Place) -> list[Any]:
        return [self.files.setdefault(place.file, len(self.files)), place.line, place.column]

    def _origin(self, node: NodeSpec) -> int:
        origin = node.origin
        made = [node.stage.id, origin.reference, bool(origin.folder), origin.arguments]
        number = self._numbers.setdefault(repr(made), len(self.origins))
        if number == len(self.origins):
            self.origins.append(made)
        return number


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return {SOURCE: str(value)} if isinstance(value, Source) else value


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(each) for each in value)
    return Source(value[SOURCE]) if isinstance(value, dict) else value


class _Places(Mapping[str, Place]):
    """Where things were written, of which few are ever asked for."""

    def __init__(self, written: Mapping[str, Sequence[Any]], files: Sequence[str]) -> None:
        self._written, self._files = written, files

    def __getitem__(self, name: str) -> Place:
        file, line, column = self._written[name]
        return Place(self._files[file], line, column)

    def __iter__(self) -> Iterator[str]:
        return iter(self._written)

    def __len__(self) -> int:
        return len(self._written)


def _restored(kept: Mapping[str, Any], file: Path) -> Pipeline | None:
    """Return the pipeline that was kept; None if its stages are no longer what, or where, they were."""
    path = file.absolute()
    stages = _stages(kept["origins"], str(path.parent))
    modules = kept["modules"].items()
    if stages is None or any(getattr(sys.modules.get(n), "__file__", at) != at for n, (at, _) in modules):
        return None
    files, nodes = kept["places"], []
    entries = [
        (name, *stages[number], Place(files[at[0]], *at[1:]), tuple(needs), _Places(needs, files))
        for name, number, at, needs in kept["entries"]
    ]
    for number, name, each, values, written, resources, timeout in kept["nodes"]:
        entry, stage, origin, place, needs, need_places = entries[number]
        params = stage.Params(**{parameter: _value(value) for parameter, value in values.items()})
        places, takes = _Places(written, files), Resources(*resources)
        nodes.append(
            NodeSpec(name, entry, stage, origin, each, params, places, place, needs, need_places, takes, timeout)
        )
    return Pipeline(kept["name"], path, tuple(nodes))


def _stages(origins: Sequence[Sequence[Any]], folder: str) -> list[tuple[Stage, Origin]] | None:
    """Return every stage and where it comes from; None if a name now means another one."""
    found = []
    if any(local for _, _, local, _ in origins):
        from stagegraph.local import forget

        forget(folder)
    for stage_id, reference, local, arguments in origins:
        origin = Origin(reference, folder if local else "", tuple(arguments))
        try:
            if not (local or arguments) and stage_reference(stage_id) != reference:
                return None
            found.append((origin.make() if local or arguments else get_stage(stage_id), origin))
        except Exception:  # noqa: BLE001 - a module of the user's; reading the file says what is wrong
            return None
    return found
