"""Runs one stage in this process, without the engine: for unit tests of stages."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from blake3 import blake3

from stagegraph.stage import Instance, NewPart, Part, Piece, Source, SourceFiles, Stage, list_files
from stagegraph.store.index import Index
from stagegraph.store.memo import Memo, PartCode, PartEntry
from stagegraph.store.objects import Store

# What the engine would hash for the key, as far as a stage says it on.
DOCUMENT = {"code": {}, "tools": {"torch": "2"}, "libraries": {"numpy": "1 ab", "torch": "2 cd"}, "inputs": {}}


@dataclass
class LocalContext:
    """The stage author's context with everything in memory or in one directory."""

    params: Any
    out: Path
    connected: Mapping[str, Path | list[Instance]]
    sources: Mapping[str, SourceFiles]
    memo: Memo | None = None
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    progressed: dict[str, tuple[int, int]] = field(default_factory=dict)  # unit -> done last, of how many
    summary_text: str = ""
    document: Mapping[str, Any] = field(default_factory=lambda: dict(DOCUMENT))
    elsewhere: Elsewhere | None = None

    def input(self, port: str) -> Path:
        path = self.connected[port]
        assert isinstance(path, Path)
        return path

    def inputs(self, port: str) -> list[Instance]:
        instances = self.connected[port]
        assert isinstance(instances, list)
        return instances

    def has_input(self, port: str) -> bool:
        return port in self.connected

    def source(self, name: str) -> SourceFiles:
        return self.sources[name]

    def recall(self, kind: str, document: Mapping[str, Any]) -> Part | None:
        assert self.memo
        return self.memo.recall(kind, document)

    def remember(self, kind: str, document: Mapping[str, Any], file: Path, **facts: Any) -> Part:
        assert self.memo
        return self.memo.remember(kind, document, file, **facts)

    def remember_all(self, kind: str, parts: Sequence[NewPart]) -> None:
        assert self.memo
        self.memo.remember_all(kind, parts)

    def map(self, kind: str, pieces: Sequence[Piece]) -> list[Any] | None:
        return self.elsewhere.make(self, kind, pieces) if self.elsewhere else None

    def progress(self, done: int, total: int, unit: str = "", note: str = "") -> None:
        assert 0 <= done <= (total or done), f"progress {done} of {total} {unit}"
        self.progressed[unit] = done, total

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def fact(self, name: str, value: Any) -> None:
        self.facts[name] = value

    def view(self, name: str, text: str) -> None:
        self.views[name] = text

    def summary(self, text: str) -> None:
        self.summary_text = text


@dataclass
class Elsewhere:
    """Makes the pieces of a stage, each as a machine of its own would; ``made`` are their parts."""

    stage: Stage
    folder: Path
    made: list[PartEntry] = field(default_factory=list)

    def make(self, ctx: LocalContext, kind: str, pieces: Sequence[Piece]) -> list[Any]:
        assert ctx.memo
        results = []
        for i, piece in enumerate(pieces):
            folder = self.folder / str(i)
            index = Index(folder / "index")
            memo = Memo(Store(folder, index), ctx.memo._codes)
            (folder / "out").mkdir(parents=True)
            sources = {
                name: SourceFiles(
                    files.root,
                    {file: files.files[file] for file in piece.files.get(name, ())},
                    {file: files.digests[file] for file in piece.files.get(name, ())},
                )
                for name, files in ctx.sources.items()
            }
            there = LocalContext(ctx.params, folder / "out", self._inputs(ctx, piece, folder), sources, memo)
            results.append(json.loads(json.dumps(self.stage.make(there, json.loads(json.dumps(piece.what))))))
            parts = {name: entry for name, entry in memo.entries.items() if entry["kind"] == kind}
            for entry in parts.values():
                shutil.copy(memo._store.path(entry["digest"]), folder / entry["digest"])
                ctx.memo._store.adopt(folder / entry["digest"], entry["digest"])
            if parts:
                ctx.memo.take(kind, parts)
            self.made += parts.values()
            index.close()
        return results

    @staticmethod
    def _inputs(ctx: LocalContext, piece: Piece, folder: Path) -> Mapping[str, Path | list[Instance]]:
        """Return the inputs; of those whose files the piece names, these alone."""
        inputs = dict(ctx.connected)
        for port in inputs.keys() & piece.files.keys():
            inputs[port] = folder / "in" / port
            for name in piece.files[port]:
                (folder / "in" / port / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ctx.input(port) / name, folder / "in" / port / name)
        return inputs


def run_stage(
    stage: Stage,
    out: Path,
    params: Mapping[str, Any],
    inputs: Mapping[str, Path | list[Instance]] | None = None,
    memo: Path | None = None,
    elsewhere: Elsewhere | None = None,
) -> LocalContext:
    """Resolve params, run the stage into ``out`` and check that every declared output is there.

    What the stage memoises goes to the folder ``memo``; without one, to a new one beside ``out``.
    """
    resolved = stage.resolve(stage.Params(**params))
    sources = {}
    for name, spec in stage.Params.__dataclass_fields__.items():
        value = getattr(resolved, name)
        if isinstance(value, Source) or "include" in spec.metadata:
            sources[name] = (
                source_files(Path(value), spec.metadata["include"], spec.metadata["alone"]) if value else None
            )
    out.mkdir(parents=True, exist_ok=True)
    folder = memo or Path(tempfile.mkdtemp(prefix="memo-", dir=out.parent))
    index = Index(folder / "index")
    kept = Memo(Store(folder, index), dict.fromkeys(stage.parts, PartCode("of this test", {})))
    ctx = LocalContext(resolved, out, dict(inputs or {}), {k: v for k, v in sources.items() if v}, kept)
    ctx.elsewhere = elsewhere
    try:
        stage.run(ctx)
    finally:
        index.close()
    for port, spec in stage.outputs.items():
        assert (out / spec.path).exists(), f"{stage.id} did not write its port {port}"
    return ctx


def source_files(root: Path, include: tuple[str, ...], alone: tuple[str, ...] = ()) -> SourceFiles:
    base, files = list_files(root, include, alone) if root.is_file() else (root, _below(root, include))
    return SourceFiles(base, files, {name: blake3(p.read_bytes()).hexdigest() for name, p in files.items()})


def _below(root: Path, include: tuple[str, ...]) -> dict[str, Path]:
    """Return the files below a folder that match a pattern, by their paths in it."""
    files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    return {name: p for name, p in files.items() if any(fnmatchcase(name, pattern) for pattern in include)}
