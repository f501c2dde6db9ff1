"""Entries with ``uses: shell``: what the command gets, what is kept of it, what is in its key, what is refused."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from stagegraph import Pipeline
from stagegraph.spec.schema import json_schema
from tests.support.demo import Demo

FAILED, LINK = "the command ended with status 1", "as a link or special file; outputs are real files"
PIPELINE = """\
version: 1
name: demo
vars: {mark: "!"}
stages:
  read: {with: {text: words}}
  count:
    uses: shell
    with:
      cmd: |
        wc -w < ${in.words} | tr -d ' \\n' > ${out.count}
        echo "counted $(cat ${out.count})${vars.mark}"
        mkdir -p rest notes/deep; echo x > rest/undeclared; echo y > notes/deep/kept
        cat ${in.table} >> ${out.count}
      inputs: {words: read.words}
      sources: {table: table.txt}
      outputs: {count: sub/count.txt, notes: notes}
"""


@pytest.fixture
def shell(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> Demo:
    monkeypatch.chdir(demo.folder)
    demo.pipeline.write_text(PIPELINE)
    (demo.folder / "table.txt").write_text(" of a table")
    return demo


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def command(shell: Demo, cmd: str, **more: str) -> None:
    """Make the pipeline one entry with this command."""
    rest = "".join(f"      {key}: {value}\n" for key, value in ({"outputs": "{out: out.txt}"} | more).items())
    shell.pipeline.write_text(
        f"version: 1\nname: demo\nstages:\n  it:\n    uses: shell\n    with:\n      cmd: {cmd}\n{rest}"
    )


def out(shell: Demo) -> str:
    return shell.path("it", "out.txt").read_text()


def test_a_command_reads_its_inputs_and_keeps_its_outputs(shell: Demo) -> None:
    assert shell.run().outcomes == {"read": "BUILT", "count": "BUILT"}
    assert shell.path("count", "sub", "count.txt").read_text() == "3 of a table"
    assert shell.path("count", "notes", "deep", "kept").read_text() == "y\n"
    assert sorted(path.name for path in shell.path("count").iterdir()) == ["notes", "sub"]
    log = shell("log", "count").out
    assert "counted 3!" in log
    assert str(shell.folder) not in log.replace("bash", ""), "paths are the same wherever it runs"
    assert shell.run().outcomes == {"read": "HIT", "count": "HIT"}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("counted", "found", "cmd: "),
        ('mark: "!"', 'mark: "?"', "cmd: "),
        ("sub/count.txt", "count.txt", "outputs: "),
        ("notes: notes}", "notes: notes}\n      env: {LOUD: yes}", "env_LOUD: none -> yes"),
        ("notes: notes}", "notes: notes}\n      tools: [sed]", "tool_sed sed is new"),
        ("table: table.txt}", "table: table.txt, more: words}", "in_more a.txt is new"),
        ("words: read.words}", "words: read.words, n: read.count}", "input n is new"),
    ],
)
def test_all_that_is_declared_is_in_the_key(shell: Demo, old: str, new: str, reason: str) -> None:
    shell.run()
    replace(shell.pipeline, old, new)
    (node,) = [node for node in shell("status", "--json").json["nodes"] if node["node"] == "count"]
    assert node["status"] == "STALE"
    assert any(text.startswith(reason) for text in node["reasons"]), node["reasons"]


def test_sources_and_programs_count_by_content(shell: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = shell.folder / "bin" / "shout"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho loud\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    command(
        shell,
        "[bash, -c, 'shout > ${out.out}; cat ${in.data}/*/* >> ${out.out}']",
        tools="[shout]",
        sources="{data: data}",
    )
    deep = shell.folder / "data" / "deep" / "file"
    deep.parent.mkdir(parents=True)
    deep.write_text("one")
    assert shell.run().outcomes == {"it": "BUILT"}
    assert out(shell) == "loud\none"
    deep.write_text("two")
    assert "in_data deep/file changed" in shell("status").out
    assert shell.run().outcomes == {"it": "BUILT"}
    tool.write_text("#!/bin/sh\necho quiet\n")
    assert "tool_shout shout changed" in shell("status").out
    assert shell.run().outcomes == {"it": "BUILT"}
    assert out(shell) == "quiet\ntwo"
    command(shell, "[shout]", tools="[]", outputs="{out: out.txt}")
    assert shell.run().outcomes == {"it": "FAILED"}
    tool.write_text("#!/bin/sh\necho > out.txt\n")
    assert shell.run().outcomes == {"it": "BUILT"}, "the program of a list counts undeclared"


def test_only_what_is_declared_reaches_it(shell: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDECLARED", "seen")
    monkeypatch.setenv("HOME", str(shell.folder))
    script = shell.folder / "src" / "script.py"
    script.parent.mkdir()
    (script.parent / "undeclared.py").write_text("")
    script.write_text(
        "import os, sys, pathlib\n"
        "try:\n    import undeclared\nexcept ImportError:\n    pass\nelse:\n    sys.exit('saw it')\n"
        "seen = sorted(set(os.environ) - {'PATH', 'LC_CTYPE', 'PWD', 'SHLVL', '_', 'OLDPWD'})\n"
        "here = sorted(path.name for path in [*pathlib.Path('.').iterdir(), *pathlib.Path.home().iterdir()])\n"
        "pathlib.Path(sys.argv[1]).write_text(f'{seen} {here} {os.environ[\"GIVEN\"]}')\n"
    )
    command(
        shell, f"[{sys.executable}, '${{in.script}}', '${{out.out}}']", sources="{script: src/script.py}",
        env="{GIVEN: 'a ${out.out} $${b}'}",
    )  # fmt: skip
    assert shell.run().outcomes == {"it": "BUILT"}, shell("log", "it").out
    assert out(shell) == "['GIVEN', 'HOME', 'LANG', 'TMPDIR'] [] a out.txt ${b}"


def test_a_literal_stays_one(shell: Demo) -> None:
    command(shell, "['echo', '$${in.words} $${x}']", outputs="{out: out.txt}")
    command(shell, "'X=1; echo \"$${X} $${in} ${env.WORD}\" > ${out.out}'")
    os.environ["WORD"] = "w"
    try:
        assert shell.run().outcomes == {"it": "FAILED"}, "bash is told that ${in} is unset"
        assert "in: unbound variable" in shell("log", "it").out
        command(shell, "'in=2; X=1; echo \"$${X} $${in} ${env.WORD}\" > ${out.out}'")
        assert shell.run().outcomes == {"it": "BUILT"}
    finally:
        del os.environ["WORD"]
    assert out(shell) == "1 2 w\n"


@pytest.mark.parametrize(
    ("cmd", "says"),
    [
        ("'echo first; echo last >&2; exit 3'", ["the command ended with status 3; its last lines:\nfirst\nlast"]),
        ("'false | cat; echo > ${out.out}'", ["the command ended with status 1 and printed nothing"]),
        ("'echo $${UNSET} > ${out.out}'", [f"{FAILED}; its last lines:\nbash: line 1: UNSET: unbound variable"]),
        ("'kill -9 $$'", ["the command was killed by signal 9 and printed nothing"]),
        ("'true'", ["the command wrote no output 'out' (out.txt)"]),
        ("'mkdir ${out.out}'", ["the command wrote no output 'out' (out.txt)"]),
        ("'ln -s /etc/passwd ${out.out}'", [f"the command wrote out.txt {LINK}"]),
    ],
)  # fmt: skip
def test_how_a_command_fails(shell: Demo, cmd: str, says: list[str]) -> None:
    command(shell, cmd)
    result = shell.run()
    (node,) = result.json["nodes"]
    assert (result.code, node["outcome"]) == (1, "FAILED")
    assert [text.replace("/usr/bin/", "").replace("/bin/", "") for text in node["problems"]] == says
    assert "bug" not in result.err


def test_what_it_leaves_running_holds_nothing_up(shell: Demo) -> None:
    command(shell, "'sleep 60 & echo done > ${out.out}'")
    result = shell.run()
    assert result.outcomes == {"it": "BUILT"}
    assert result.json["seconds"] < 30


def test_a_secret_reaches_it_and_nothing_else(shell: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hush-hush")
    command(shell, "'echo \"token $$TOKEN\"; echo $${#TOKEN} > ${out.out}'", env="{TOKEN: '${secret.MY_TOKEN}'}")
    replace(shell.pipeline, "$$TOKEN", "$TOKEN")
    result = shell.run()
    assert result.outcomes == {"it": "BUILT"}
    assert out(shell) == "9\n"
    assert "token ***" in shell("log", "it").out
    assert not [path for path in shell.folder.rglob("*") if path.is_file() and b"hush-hush" in path.read_bytes()]


def test_hard_links_become_files(shell: Demo) -> None:
    command(shell, "'echo x > rest; ln rest ${out.out}'")
    assert shell.run().outcomes == {"it": "BUILT"}
    assert out(shell) == "x\n"


def test_one_command_reads_another_and_instances_meet(shell: Demo) -> None:
    shell.pipeline.write_text("""\
version: 1
name: demo
stages:
  one:
    uses: shell
    foreach: {word: [a, b]}
    with: {cmd: "echo ${each.word} > ${out.word}", outputs: {word: word.txt}}
  two:
    uses: shell
    foreach: {word: [a, b]}
    with: {cmd: "cat ${in.word} ${in.word} > ${out.twice}", inputs: {word: one.word}, outputs: {twice: twice.txt}}
""")
    assert set(shell.run().outcomes.values()) == {"BUILT"}
    assert [shell.path(f"two.{word}", "twice.txt").read_text() for word in "ab"] == ["a\na\n", "b\nb\n"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("${in.table}", "${in.tabel}", "9:12: unknown '${in.tabel}'; did you mean 'in.table'?"),
        ("${in.table}", "${output.count}", "9:12: unknown reference '${output.count}'; expected ${vars.NAME}"),
        ("read.words", "raed.words", "14:23: count.inputs.words: unknown entry 'raed'; did you mean 'read'?"),
        ("read.words", "read.wards", "6:3: count: port 'words' reads read.wards, but that"),
        ("read.words", "read", "14:23: count.inputs.words: found the text 'read'; expected ENTRY.OUTPUT"),
        ("read.words", "count.count", "14:23: count.inputs.words: 'count' reads itself; expected another entry"),
        ("table: table.txt", "words: table.txt", "15:17: 'words' is an input too; expected another name"),
        ("table: table.txt", "Table: table.txt", "15:17: count.sources: 'Table' cannot be a name here; expected lower"),
        ("table: table.txt", "table: none.txt", "15:24: count.in_table: there is no file or directory "),
        ("sub/count.txt", "../count.txt", "16:24: count.outputs.count: found the text '../count.txt'; expected a path"),
        ("sub/count.txt", "/count.txt", "16:24: count.outputs.count: found the text '/count.txt'; expected a path"),
        ("sub/count.txt", "notes/n", "16:7: 'count' (notes/n) lies in 'notes' (notes); expected them apart"),
        ("sub/count.txt", "notes", "16:7: 'notes' (notes) lies in 'count' (notes); expected them apart"),
        ("outputs: {count: sub/count.txt, notes: notes}", "tools: [jq, 3]", "6:3: count.outputs: declares no output"),
        ("outputs:", "output:", "16:7: unknown key 'output'; did you mean 'outputs'?"),
        ("notes: notes}", "notes: notes}\n      tools: [no-such-program]", "6:3: count: there is no program 'no-"),
        ("notes: notes}", "notes: notes}\n      tools: jq", "17:14: count.tools: found the text 'jq'; expected a list"),
        ("notes: notes}", "notes: notes}\n      env: {A: 3}", "17:16: count.env_A: found the number 3; expected"),
        ("notes: notes}", 'notes: notes}\n      env: {A: "a\\0b"}', "6:3: count: env.A: has a NUL character, which no"),
        ('mark: "!"', 'mark: "\\0"', "6:3: count: cmd: has a NUL character, which no program can be given"),
        ("cmd: |", "cmds: |", "8:5: missing parameter 'cmd' of stage 'shell'; expected a list, each text"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(shell: Demo, old: str, new: str, says: str) -> None:
    replace(shell.pipeline, old, new)
    result = shell("status", "--json")
    assert result.code == 2
    assert any(problem.startswith(f"pipeline.yaml:{says}") for problem in result.json["problems"]), result.json


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("outputs:", "output:"),
        ("sub/count.txt", "../count.txt"),
        ("read.words", "read"),
        ("table: table.txt", "Table: table.txt"),
        ("notes: notes}", "notes: notes}\n      env: {A: 3}"),
    ],
)
def test_the_schema_for_editors_takes_what_the_engine_takes(shell: Demo, old: str, new: str) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    assert not [error.message for error in validator.iter_errors(yaml.safe_load(PIPELINE))]
    assert not validator.is_valid(yaml.safe_load(PIPELINE.replace(old, new)))


def test_a_list_runs_no_shell_and_needs_a_program(shell: Demo) -> None:
    command(shell, "['touch', 'out.txt', '$HOME; x']")
    assert shell.run().outcomes == {"it": "BUILT"}
    command(shell, "[]")
    assert "its cmd is empty; expected a program and its arguments" in shell("status").err
    command(shell, "[./script.sh]")
    assert (
        "there is no program './script.sh' on PATH; install it, or declare a file under 'sources'"
        in shell("status").err
    )
    (shell.folder / "script.sh").write_text("#!/bin/sh\necho ran > out.txt\n")
    (shell.folder / "script.sh").chmod(0o755)
    command(shell, "['${in.script}']", sources="{script: script.sh}")
    assert shell.run().outcomes == {"it": "BUILT"}
    assert out(shell) == "ran\n"


def test_a_command_fails_also_where_whoever_started_the_run_ignores_the_ends_of_children(shell: Demo) -> None:
    command(shell, '"echo x > ${out.out}; exit 3"')
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Pipeline(shell.pipeline) as pipeline:
            assert [outcome.status for outcome in pipeline.run().outcomes] == ["FAILED"]
        assert shell.run().code == 1
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)
