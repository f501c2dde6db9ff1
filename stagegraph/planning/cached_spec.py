"""Caches the parsed pipeline file, for as long as nothing that it was read from has changed.

Reading YAML, and importing the modules that check it, take most of the time of a run that has nothing to do. So the
index holds the parsed pipeline as JSON, with everything that it depended on: the text of its files, the environment
variables that it names, the targets of symbolic links, and every module that was loaded, since any may declare a
parameter or its choices. A pipeline that has a secret is not cached.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from stagegraph.digest import digest_bytes, digest_json, stat_id
from stagegraph.files import open_regular
from stagegraph.registry import Origin, get_stage, stage_reference
from stagegraph.spec.model import NodeSpec, PipelineSpec, Place, Remote, Resources
from stagegraph.stage import Source

if TYPE_CHECKING:
    from stagegraph.spec.item import Reads
    from stagegraph.stage import Stage
    from stagegraph.store.index import Index

SCHEMA = 3
SLOTS = 16  # pipeline files, and settings of one, that are cached side by side in one index
RACY_NS = 50_000_000  # a file changed this shortly before it was read may change again within one clock tick
SOURCE = "source"  # {SOURCE: path} is a parameter that names a source


class Dependencies(TypedDict):
    """What a parsed file depended on.

    ``files`` are path -> digest, ``links`` path -> where it led, ``env`` the names of environment variables and
    ``env_digest`` the digest of their values, ``modules`` name -> [file, its stat].
    """

    files: dict[str, str]
    links: dict[str, str]
    env: list[str]
    env_digest: str
    modules: dict[str, list[Any]]


class Parsed(Dependencies):
    """A parsed file; places and entries refer to ``places`` (file names), ``origins`` and one another by number."""

    name: str
    places: list[str]
    origins: list[list[Any]]
    entries: list[list[Any]]
    nodes: list[list[Any]]
    remotes: list[list[Any]]


class Cached(Parsed):
    """A parsed file as the index has it; ``identity`` says which file it is, read how."""

    identity: list[Any]


def read_pipeline(file: Path, overrides: Sequence[str], index: Index) -> PipelineSpec:
    """Return what :func:`stagegraph.spec.load.load` does, from the index while nothing it depends on has changed."""
    identity: list[Any] = [SCHEMA, str(file), os.getcwd(), list(overrides)]  # noqa: PTH109
    name = f"spec:{int(digest_json(identity)[:8], 16) % SLOTS}"
    found = index.get(name)
    if isinstance(found, dict) and found.get("identity") == identity and _is_fresh(cached := cast("Cached", found)):
        pipeline = _from_json(cached, file)
        if pipeline is not None:
            return pipeline
    from stagegraph.spec.item import Reads
    from stagegraph.spec.load import load

    reads = Reads()
    pipeline = load(file, overrides, reads=reads)
    parsed = _to_json(pipeline, reads)
    if parsed is not None:
        index.set(name, {"identity": identity, **parsed})
    return pipeline


# -- what it was read from -------------------------------------------------------------------------------------------


def _is_fresh(cached: Cached) -> bool:
    """Say whether nothing has changed that the file depended on; no, if a module changed too recently to tell."""
    try:
        files = {path: digest_bytes(_content(path)) for path in cached["files"]}
        stats = {name: [path, list(stat_id(path))] for name, (path, _) in cached["modules"].items()}
    except OSError:
        return False
    links = {path: os.path.realpath(path) for path in cached["links"]}
    env_digest = _env_digest({name: os.environ.get(name) for name in cached["env"]})
    same_files = (files, links, stats) == (cached["files"], cached["links"], cached["modules"])
    return same_files and env_digest == cached["env_digest"] and _loaded_as_on_disk(stats)


def _content(path: str) -> bytes:
    with open_regular(path) as file:
        return file.readall()


def _env_digest(env: Mapping[str, str | None]) -> str:
    return digest_json(env)


def _loaded_modules() -> dict[str, list[Any]]:
    """Return module -> [file, stat] of all loaded modules outside the standard library."""
    library = f"{os.path.dirname(os.__file__)}{os.sep}"  # noqa: PTH120
    others = f"{library}site-packages{os.sep}"
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return {
        name: [path, list(stat_id(path))]
        for name, path in files.items()
        if path and name != "__main__" and (path.startswith(others) or not path.startswith(library))
    }


def _loaded_as_on_disk(modules: Mapping[str, Sequence[Any]]) -> bool:
    """Say whether this process loaded the modules as their files are now: none has changed since the process began."""
    try:
        began = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return False
    # An interruption between reading the two clocks makes the start seem earlier, never later.
    began_ns = max(time.time_ns() - int((time.clock_gettime(time.CLOCK_BOOTTIME) - began) * 1e9) for _ in range(3))
    return all(max(stat[3:]) < began_ns - RACY_NS for _, stat in modules.values())


# -- as plain data ---------------------------------------------------------------------------------------------------


def _to_json(pipeline: PipelineSpec, reads: Reads) -> Parsed | None:
    """Return a pipeline with all that it depended on, or None if it cannot be cached."""
    try:
        modules = _loaded_modules()
    except OSError:
        return None
    whole = all(not hasattr(type(node.params), "__post_init__") for node in pipeline.nodes)
    if not (reads.lasting and whole and _loaded_as_on_disk(modules)):
        return None
    writer = _NodeWriter(pipeline)
    nodes = [writer.node(node) for node in pipeline.nodes]
    return {
        "files": {path: digest_bytes(data) for path, data in reads.files.items()},
        "links": reads.links,
        "env": list(reads.env),
        "env_digest": _env_digest(reads.env),
        "modules": modules,
        "name": pipeline.name,
        "places": list(writer.files),
        "origins": writer.origins,
        "entries": list(writer.entries.values()),
        "nodes": nodes,
        "remotes": [list(remote) for remote in pipeline.remotes],
    }


class _NodeWriter:
    """Turns nodes into lists; what the nodes of an entry share, and the names of files, are written once."""

    def __init__(self, pipeline: PipelineSpec) -> None:
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
        values = {name: _encoded(getattr(node.params, name)) for name in node.places}
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


def _encoded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encoded(each) for each in value]
    return {SOURCE: str(value)} if isinstance(value, Source) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(each) for each in value)
    return Source(value[SOURCE]) if isinstance(value, dict) else value


class _Places(Mapping[str, Place]):
    """The places of values in the pipeline files, made only when asked for, which is seldom."""

    def __init__(self, written: Mapping[str, Sequence[Any]], files: Sequence[str]) -> None:
        self._written, self._files = written, files

    def __getitem__(self, name: str) -> Place:
        file, line, column = self._written[name]
        return Place(self._files[file], line, column)

    def __iter__(self) -> Iterator[str]:
        return iter(self._written)

    def __len__(self) -> int:
        return len(self._written)


def _from_json(cached: Cached, file: Path) -> PipelineSpec | None:
    """Return a cached pipeline; None if a stage is no longer found, or found elsewhere."""
    path = file.absolute()
    stages = _stages(cached["origins"], str(path.parent))
    modules = cached["modules"].items()
    if stages is None or any(getattr(sys.modules.get(n), "__file__", at) != at for n, (at, _) in modules):
        return None
    files, nodes = cached["places"], []
    entries = [
        (name, *stages[number], Place(files[at[0]], *at[1:]), tuple(needs), _Places(needs, files))
        for name, number, at, needs in cached["entries"]
    ]
    for number, name, each, values, written, resources, timeout in cached["nodes"]:
        entry, stage, origin, place, needs, need_places = entries[number]
        params = stage.Params(**{parameter: _decoded(value) for parameter, value in values.items()})
        places, takes = _Places(written, files), Resources(*resources)
        nodes.append(
            NodeSpec(name, entry, stage, origin, each, params, places, place, needs, need_places, takes, timeout)
        )
    return PipelineSpec(cached["name"], path, tuple(nodes), tuple(Remote(*remote) for remote in cached["remotes"]))


def _stages(origins: Sequence[Sequence[Any]], folder: str) -> list[tuple[Stage, Origin]] | None:
    """Return every stage with its origin; None if a stage's id now means another one."""
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
        except Exception:  # noqa: BLE001 - the user's module is at fault; reading the file afresh reports how
            return None
    return found
