"""Stages that together do all that a stage can: sources, facts, views, parts, large files, links to inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lab.notes import nap, note
from stagegraph.stage import Context, In, Out, Source, Stage, param, source

LARGE = (16 << 20) + 5  # bytes: the store makes a hard link of a file from 16 MiB
PIECES = 4


@contextmanager
def noted(name: str) -> Iterator[None]:
    """Note the begin of an execution, and its end if it has one."""
    note("begin", name)
    yield
    nap()
    note("end", name)


class Read(Stage):
    """Reads a source, tells a fact, a view and a summary."""

    id = "lab-read"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        text: Source = source("words", include=("*.txt",))
        tag: str = param("tag", default="x")

    outputs = {"words": Out("words.txt", "the words")}

    def run(self, ctx: Context) -> None:
        with noted(f"read|{ctx.params.tag}"):
            text = "".join(path.read_text() for path in ctx.source("text").files.values())
            (ctx.out / "words.txt").write_text(text + ctx.params.tag)
            ctx.fact("words", len(text.split()))
            ctx.view("page", text)
            ctx.summary(f"{len(text.split())} words")
            print("read was here")


class Cut(Stage):
    """Makes and reuses parts; even ones are shared between all nodes."""

    id = "lab-cut"
    parts = {"piece": "lab.stages"}

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        which: str = param("which")

    inputs = {"words": In("lab-read", "words", "the words")}
    outputs = {"pieces": Out("pieces", "a directory")}

    def run(self, ctx: Context) -> None:
        with noted(f"cut|{ctx.params.which}|{ctx.input('words').read_text()[-1]}"):
            words = ctx.input("words").read_text()
            folder = ctx.out / "pieces" / "deep"
            folder.mkdir(parents=True)
            for i in range(PIECES):
                document = {"i": i, "words": words, "which": ctx.params.which if i % 2 else "all"}
                target = folder / f"piece{i}"
                part = ctx.recall("piece", document)
                if part is None:
                    note("made", f"{i}|{document['which']}|{words[-1]}")
                    target.write_text(repr(sorted(document.items())) * 50)
                    nap()
                    ctx.remember("piece", document, target, i=i)
                elif part.facts["i"] != i:
                    raise ValueError(f"part {i} has the facts of another: {part.facts}")
                else:
                    target.write_bytes(part.path.read_bytes())


class Big(Stage):
    """Writes a file large enough for hard links."""

    id = "lab-big"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

    inputs = {"words": In("lab-read", "words", "the words")}
    outputs = {"big": Out("big", "a directory")}

    def run(self, ctx: Context) -> None:
        words = ctx.input("words").read_bytes()
        with noted(f"big|{words[-1:].decode()}"):
            (ctx.out / "big").mkdir()
            with (ctx.out / "big" / "weights.bin").open("wb") as file:
                file.write(words)
                file.truncate(LARGE)
            (ctx.out / "big" / "small.json").write_text("{}")


class Join(Stage):
    """Joins everything, and passes the large file on as a hard link where that can be."""

    id = "lab-join"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        glue: str = param("between", default="-")

    inputs = {
        "pieces": In("lab-cut", "pieces", "all pieces", many=True),
        "big": In("lab-big", "big", "a large file"),
    }
    outputs = {"joined": Out("joined", "the result")}

    def run(self, ctx: Context) -> None:
        big = ctx.input("big") / "weights.bin"
        with big.open("rb") as file:
            head = file.read(64).rstrip(b"\0").decode()
        with noted(f"join|{ctx.params.glue}|{head[-1]}"):
            folder = ctx.out / "joined"
            folder.mkdir()
            try:
                os.link(big, folder / "weights.bin")
            except OSError:
                (folder / "weights.bin").write_bytes(big.read_bytes())
            found = [p.read_text() for each in ctx.inputs("pieces") for p in sorted(each.path.rglob("piece*"))]
            (folder / "text").write_text(ctx.params.glue.join([head, *found]))
