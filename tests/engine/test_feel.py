"""How the command line feels: help that fits, suggestions, colours, documents of a known shape."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

from stagegraph.api import Pipeline
from stagegraph.cli import layout, main, verbs
from stagegraph.query.artifact import Artifact
from tests.support.demo import Demo
from tests.support.output_schema import validate


@pytest.mark.parametrize("verb", verbs.verb_names())
def test_help_fits_a_screen(verb: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = verbs.build_parser(verb).format_help().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= (
        33 if verb in {"generate", "chat", "run", "serve"} else 25
    )  # how to pick tokens, whom to believe, what to run
    assert lines[-1].startswith("example: ")


@pytest.mark.parametrize("verb", verbs.verb_names())
def test_the_example_of_each_verb_parses(verb: str, demo: Demo) -> None:
    import shlex

    example = verbs.build_parser(verb).format_help().splitlines()[-1].removeprefix("example: ")
    command = example.partition("pipeline ")[2].partition(" > ")[0].partition(" ||")[0].partition(')"')[0]
    name, *rest = shlex.split(command)
    assert name == verb
    verbs.parse(verb, rest)


def test_the_list_of_verbs_fits_a_screen() -> None:
    lines = verbs.usage().splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80


def test_misspelt_verbs_and_options_get_a_suggestion(demo: Demo) -> None:
    assert "no verb 'statsu'; did you mean 'status'?" in demo("statsu").err
    result = demo("run", str(demo.pipeline), "--dry-rum")
    assert (result.code, result.err) == (2, "error: unknown argument '--dry-rum'; did you mean '--dry-run'?\n")
    assert "did you mean '--stage'?" in demo("run", str(demo.pipeline), "--stages=x").err
    extra = demo("status", str(demo.pipeline), "extra").err
    assert extra == "error: 'extra' is one argument too many; `pipeline status` takes a pipeline file alone\n"


def test_help_takes_a_verb_and_ends(demo: Demo) -> None:
    assert demo("help", "run").out.startswith("usage: pipeline run [options] [FILE]")
    for argv in (["--help", "--help"], ["help", "help"], ["-h", "--json"]):
        assert (demo(*argv).code, demo(*argv).out) == (0, f"{verbs.usage()}\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["show"], "the following arguments are required: REF; `pipeline show --help` lists its arguments"),
        (["runs", "-n", "x"], "-n: found 'x'; expected a whole number; `pipeline runs --help` lists its arguments"),
        (["runs", "-n", "0"], "-n 0: expected at least 1"),
        (["graph", "--format", "svgz"], "--format: unknown value 'svgz'; did you mean 'svg'?"),
        (["completion", "tcsh"], "SHELL: unknown value 'tcsh'; known: bash, fish, zsh"),
        (["show", "nothing"], "no node is named 'nothing'; known: join, read, shape"),
        (["show", "shape[a,b,c,d,e,f]"], "no node is named 'shape[a,b,c,d,e,f]'; known: shape[column], shape[line]"),
        (["show", "shape[lin]"], "no node is named 'shape[lin]'; did you mean 'shape[line]'?"),
    ],
)
def test_mistakes_take_one_line(demo: Demo, monkeypatch, argv: list[str], said: str) -> None:
    monkeypatch.chdir(demo.folder)
    result = demo(*argv)
    assert (result.code, result.out, result.err) == (2, "", f"error: {said}\n")
    assert demo(*argv, "--json").json["problems"] == [said]


@pytest.mark.parametrize(("verb", "goes_on"), [("run", True), ("status", False), ("generate", False)])
def test_only_run_says_that_a_rerun_goes_on(monkeypatch, capsys, verb: str, goes_on: bool) -> None:
    def interrupted(_argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "dispatch", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main.main([verb])
    assert ("run again" in capsys.readouterr().err) is goes_on


def test_colours_only_on_terminals_that_take_them(monkeypatch) -> None:
    rows = [("a", "HIT", "x"), ("b", "STALE", "HIT in the text")]
    plain = layout.table(("node", "status", "reason"), rows, flexible=2, width=80)
    assert "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    painted = layout.table(("node", "status", "reason"), rows, flexible=2, width=80)
    assert painted.count("\x1b[0m") == 2
    monkeypatch.setenv("NO_COLOR", "1")
    assert layout.table(("node", "status", "reason"), rows, flexible=2, width=80) == plain


@pytest.mark.parametrize("columns", [40, 80])
def test_tables_keep_to_the_width(demo: Demo, monkeypatch, columns: int) -> None:
    demo.run()
    monkeypatch.setenv("COLUMNS", str(columns))
    for argv in (["status"], ["run"], ["run", "--dry-run"], ["runs"], ["du"]):
        lines = demo(argv[0], str(demo.pipeline), *argv[1:]).out.splitlines()
        assert max(map(len, lines[:4])) <= columns, argv


def test_quiet_prints_problems_only(demo: Demo) -> None:
    done = demo("run", str(demo.pipeline), "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


LOOKS = [
    ["run"], ["run", "--dry-run"], ["status"], ["explain", "join"], ["show", "join"], ["runs"], ["lineage", "join"],
    ["diff", "join@~1", "join"], ["diff", "@~1", "@~0"], ["du"], ["gc", "--dry-run"], ["fsck"], ["graph"],
    ["log", "shape"], ["params"],
]  # fmt: skip


def test_json_documents_are_as_documented(demo: Demo) -> None:
    demo.run()
    demo.run("--set", "vars.glue=+")
    demo.edit("line", '" ".join', '"  ".join')
    for verb, *rest in [*LOOKS[1:], *LOOKS]:
        kind = "plan" if "--dry-run" in rest and verb == "run" else "sets" if rest == ["@~1", "@~0"] else verb
        names, options = [r for r in rest if r[0] != "-"], [r for r in rest if r[0] == "-"]
        document = demo(verb, *names, str(demo.pipeline), *options, "--json").json
        validate(document, kind)
    demo.source.write_text("FAIL\n")
    validate(demo.run().json, "run")
    failed = demo("show", "nothing", str(demo.pipeline), "--json").json
    validate(failed, "problems")


def test_the_table_of_the_python_api_names_what_there_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    named = set()
    for row in re.findall(r"^\| (`\.?\w*\..*?`) \|", page, re.MULTILINE):
        owner = Artifact if row.startswith("`artifact.") else Pipeline
        for name, arguments in re.findall(r"\.(\w+)(?:\(([^)]*)\))?`", row):
            found = getattr(owner, name)
            named.add(name)
            keywords = re.findall(r"(\w+)=", arguments)
            assert not keywords or set(keywords) <= set(inspect.signature(found).parameters), name
    public = {name for name in vars(Pipeline) if not name.startswith("_")} - {"close", "name"}
    assert named >= public | {"read_json", "read_text", "object", "view", "export"}
