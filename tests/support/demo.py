"""A small pipeline of fake stages that count their executions, run through the real engine."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stagegraph import registry
from stagegraph.cli import main as cli
from stages.provider import PROVIDER

STAGES = {
    "read": '''
        """Reads a source."""
        from __future__ import annotations
        from dataclasses import dataclass
        from fakes.counting import count
        from stagegraph.stage import Context, Out, Source, Stage, StageError, param, source

        class Read(Stage):
            """Reads words from a source file."""
            id = "read"

            @dataclass(frozen=True)
            class Params:
                """Parameters."""
                text: Source = source("words", include=("*.txt",))
                upper: bool = param("shout", default=False)
                note: str = param("a remark", default="", hashed=False)

            outputs = {"words": Out("words.txt", "the words"), "count": Out("count.txt", "how many")}

            def run(self, ctx: Context) -> None:
                count("read")
                text = "".join(p.read_text() for p in ctx.source("text").files.values())
                if "FAIL" in text:
                    raise StageError("the text says FAIL")
                (ctx.out / "words.txt").write_text(text.upper() if ctx.params.upper else text)
                (ctx.out / "count.txt").write_text(str(len(text.split())))
                ctx.fact("language", "en")
                ctx.view("page", "a page\\n")
                ctx.summary(f"{len(text.split())} words")
                if "odd" in text:
                    ctx.warn("the text is odd")
                print("read was here")
    ''',
    "shape": '''
        """One shape of the words."""
        from __future__ import annotations
        from dataclasses import dataclass
        from fakes.counting import count
        from stagegraph.stage import Context, In, Out, Stage, param

        class Shape(Stage):
            """Lays the words out."""
            id = "shape"

            @dataclass(frozen=True)
            class Params:
                """Parameters."""
                shape: str = param("which", choices="fakes.shapes:SHAPES")

            inputs = {"words": In("read", "words", "the words")}
            outputs = {"laid": Out("laid", "a directory")}

            def rows(self, params, facts):
                assert facts["language"] == "en"
                return {"fakes.shapes:SHAPES": params.shape}

            def run(self, ctx: Context) -> None:
                from fakes.shapes import lay
                count(f"shape[{ctx.params.shape}]")
                (ctx.out / "laid" / "deep").mkdir(parents=True)
                (ctx.out / "laid" / "deep" / "text").write_text(lay(ctx.params.shape, ctx.input("words").read_text()))
    ''',
    "join": '''
        """Joins the shapes."""
        from __future__ import annotations
        from dataclasses import dataclass
        from fakes.counting import count
        from stagegraph.stage import Context, In, Out, Stage, param

        class Join(Stage):
            """Joins everything."""
            id = "join"

            @dataclass(frozen=True)
            class Params:
                """Parameters."""
                glue: str = param("between", default="-")

            inputs = {"laid": In("shape", "laid", "all shapes", many=True), "count": In("read", "count", "how many")}
            outputs = {"joined": Out("joined.txt", "the result")}

            def run(self, ctx: Context) -> None:
                count("join")
                parts = [f"{i.each['shape']}={(i.path / 'deep' / 'text').read_text()}" for i in ctx.inputs("laid")]
                (ctx.out / "joined.txt").write_text(ctx.params.glue.join(parts) + ctx.input("count").read_text())
    ''',
    "deface": '''
        """Writes into its input."""
        from __future__ import annotations
        from dataclasses import dataclass
        from stagegraph.stage import Context, In, Out, Stage

        class Deface(Stage):
            """Spoils what it reads."""
            id = "deface"

            @dataclass(frozen=True)
            class Params:
                """None."""

            inputs = {"words": In("read", "words", "the words")}
            outputs = {"out": Out("out.txt", "a file")}

            def run(self, ctx: Context) -> None:
                path = ctx.input("words")
                path.chmod(0o644)
                with path.open("r+") as file:
                    file.write("DAMAGED")
                (ctx.out / "out.txt").write_text("done")
    ''',
    "trouble": '''
        """Misbehaves on demand."""
        from __future__ import annotations
        import os, signal, subprocess, time
        from dataclasses import dataclass
        from fakes.counting import count
        from stagegraph.stage import Context, Out, Stage, param

        class Trouble(Stage):
            """Misbehaves."""
            id = "trouble"

            @dataclass(frozen=True)
            class Params:
                """Parameters."""
                kind: str = param("how", default="none")

            outputs = {"out": Out("out.txt", "a file")}

            def run(self, ctx: Context) -> None:
                count("trouble")
                kind = ctx.params.kind
                if kind == "segfault":
                    os.kill(os.getpid(), signal.SIGSEGV)
                elif kind == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif kind == "bug":
                    raise KeyError("oops")
                elif kind == "sleep":
                    (ctx.out / "half.txt").write_text("half")
                    time.sleep(60)
                elif kind == "command":
                    started = os.path.join(os.path.dirname(os.environ["COUNT_FILE"]), "started")
                    subprocess.run(["sh", "-c", 'touch "$0"; sleep 60; true', started], check=True)
                elif kind == "link":
                    os.symlink(os.environ["COUNT_FILE"], ctx.out / "out.txt")
                    return
                elif kind == "orphan":
                    if os.fork() == 0:
                        time.sleep(30)
                        os._exit(0)
                    os.kill(os.getpid(), signal.SIGSEGV)
                elif kind == "late":
                    if "LINGER" in os.environ:
                        subprocess.Popen(["sh", "-c", f"sleep 1; echo x > {ctx.out}/late.txt"], start_new_session=True)
                        time.sleep(60)
                    time.sleep(2)
                elif kind == "number":
                    ctx.summary(5)
                elif kind == "set":
                    ctx.fact("n", {1, 2})
                elif kind == "escape":
                    ctx.view("../escape", "x")
                elif kind == "short":
                    time.sleep(1.0)
                elif kind == "stray":
                    (ctx.out / "stray.txt").write_text("?")
                elif kind == "memory":
                    block = bytearray(200 << 20)
                    del block
                if kind != "nothing":
                    (ctx.out / "out.txt").write_text("done" if kind != "random" else os.urandom(8).hex())
    ''',
}  # fmt: skip

OTHERS = {
    "__init__": "",
    "counting": '''
        """Counts executions across processes."""
        import os
        from pathlib import Path

        def count(name: str) -> None:
            """Append one line."""
            with Path(os.environ["COUNT_FILE"]).open("a") as file:
                file.write(name + "\\n")
    ''',
    "shapes": '''
        """A lookup table with lazily imported rows."""
        import importlib

        SHAPES = {"line": "fakes.line:lay", "column": "fakes.column:lay"}

        def lay(shape: str, text: str) -> str:
            """Lay out."""
            module, _, name = SHAPES[shape].partition(":")
            return getattr(importlib.import_module(module), name)(text)
    ''',
    "line": '''
        """Lines."""
        def lay(text: str) -> str:
            """Lay out in a line."""
            return " ".join(text.split())
    ''',
    "column": '''
        """Columns."""
        def lay(text: str) -> str:
            """Lay out in a column."""
            return "\\n".join(text.split())
    ''',
}

SHIPPED = ("verbs", "starters", "sources")  # of the real provider

PIPELINE = """\
version: 1
name: demo
vars: {text: words, shapes: [line, column], glue: "-"}
stages:
  read: {with: {text: "${vars.text}"}}
  shape: {needs: [read], foreach: {shape: "${vars.shapes}"}, with: {shape: "${each.shape}"}}
  join: {needs: [shape, read], with: {glue: "${vars.glue}"}}
"""


@dataclass
class Result:
    """What one command printed and returned."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def outcomes(self) -> dict[str, str]:
        return {n["node"]: n["outcome"] for n in self.json["nodes"]}


class Demo:
    """A directory with a pipeline, a source and the fake package."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.package = folder / "lib" / "fakes"
        self.counter = folder / "count"
        self.pipeline = folder / "pipeline.yaml"
        self.source = folder / "words" / "a.txt"
        self._capsys = capsys
        self.package.mkdir(parents=True)
        self.source.parent.mkdir()
        self.source.write_text("some words here\n")
        self.pipeline.write_text(PIPELINE)
        for name, text in {**STAGES, **OTHERS}.items():
            (self.package / f"{name}.py").write_text(textwrap.dedent(text).lstrip())

    def __call__(self, *argv: str) -> Result:
        verb, *rest = argv
        self._capsys.readouterr()
        try:
            cli.main([verb, *rest])
        except SystemExit as end:
            code = end.code
        printed = self._capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, printed.out, printed.err)

    def run(self, *argv: str) -> Result:
        return self("run", str(self.pipeline), "--json", *argv)

    @property
    def counts(self) -> list[str]:
        """The executions since the last look, sorted."""
        lines = self.counter.read_text().split() if self.counter.exists() else []
        self.counter.unlink(missing_ok=True)
        return sorted(lines)

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath("artifacts", "demo", *parts)

    def edit(self, module: str, old: str, new: str) -> None:
        path = self.package / f"{module}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


def provide(monkeypatch: pytest.MonkeyPatch, stages: dict[str, str], **tables: Any) -> None:
    """Make these the stages that are shipped, beside the real verbs; ``registry.shipped().stages`` may be added to."""
    provider = registry.Provider(stages=stages, **({n: getattr(PROVIDER, n) for n in SHIPPED} | tables))
    monkeypatch.setattr(registry, "shipped", lambda: provider)
    forget()


def forget() -> None:
    """Unload the fake package, and every stage that was looked up."""
    registry.stage_reference.cache_clear()
    registry.get_stage.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "fakes"]:
        del sys.modules[name]
