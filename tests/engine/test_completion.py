"""Completion: what may come next, and that each shell's script asks for it with the words as they are typed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stagegraph.cli.completion import SCRIPTS
from tests.support.demo import Demo

# Stands for `pipeline`: knows two nodes, and completes their names where a verb that takes one was typed.
STUB = """\
import sys
asked, *before, word = sys.argv[1:]
names = ["shape", "shape[a,b]"] if (asked, before) == ("complete", ["show"]) else []
print("\\n".join(name for name in names if name.startswith(word.strip("'\\"").replace("\\\\", ""))))
"""


def completed(demo: Demo, monkeypatch, *words: str) -> list[str]:
    monkeypatch.chdir(demo.folder)
    return demo("complete", *words).out.split("\n")[:-1]


def test_completion(demo: Demo, monkeypatch) -> None:
    assert completed(demo, monkeypatch, "ex") == ["explain", "export"]
    assert completed(demo, monkeypatch, "show", "sha") == ["shape", "shape[column]", "shape[line]"]
    assert completed(demo, monkeypatch, "show", "'shape\\[l") == ["shape[line]"]
    assert completed(demo, monkeypatch, "run", "--stage", "j") == ["join"]
    assert completed(demo, monkeypatch, "run", "--dr") == ["--dry-run"]
    assert completed(demo, monkeypatch, "graph", "--format", "") == ["ascii", "dot", "mermaid", "svg"]
    assert completed(demo, monkeypatch, "diff", "join", "re") == ["read"]
    assert completed(demo, monkeypatch, "diff", "--json", "join", "re") == ["read"]
    assert completed(demo, monkeypatch, "completion", "") == ["bash", "fish", "zsh"]
    assert completed(demo, monkeypatch, "run", "") == [""]  # a file: the shell's to complete
    monkeypatch.chdir(demo.source.parent)
    assert demo("complete", "show", "j").out == "join\n", "the pipeline file of a folder above"
    demo.pipeline.write_text("broken: [")
    assert completed(demo, monkeypatch, "show", "") == [""]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A directory with one file, `pipeline` on the path, and no one's shell settings."""
    program = tmp_path / "bin" / "pipeline"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable} -S\n{STUB}")
    program.chmod(0o755)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "sharing.yaml").touch()
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "here"


def test_bash_completes_node_names(folder: Path) -> None:
    asked = 'COMP_WORDS=(pipeline show shape); COMP_CWORD=2; _pipeline; printf "%s\\n" "${COMPREPLY[@]}"\n'
    command = ["bash", "-c", SCRIPTS["bash"] + asked]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["shape", "shape\\[a\\,b\\]"]


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pipeline show sh", ["shape", "shape[a,b]"]),
        ("pipeline show 'shape[", ["shape[a,b]"]),
        ("pipeline show ", ["shape", "shape[a,b]"]),
        ("pipeline run sha", ["sharing.yaml"]),
    ],
)
def test_fish_completes_node_names_else_files(folder: Path, line: str, offered: list[str]) -> None:
    command = ["fish", "--no-config", "-c", f'{SCRIPTS["fish"]}complete -C "{line}"']
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == offered


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("pipeline show sh", "pipeline show shape"),
        ("pipeline show 'shape[", "pipeline show 'shape[a,b]'"),
        ("pipeline run sha", "pipeline run sharing.yaml"),
    ],
)
def test_zsh_completes_node_names_else_files(folder: Path, typed: str, becomes: str) -> None:
    (folder.parent / "setup").write_text("autoload -Uz compinit; compinit -u -D\n" + SCRIPTS["zsh"])
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ |= {"TERM": "dumb", "PS1": "ready> "}
        os.execvp("zsh", ["zsh", "-f", "-i"])  # noqa: S606 - no shell but the one under test
    try:
        wait_for(terminal, "ready>")
        os.write(terminal, b". ../setup\n")
        wait_for(terminal, "setup.*ready>")
        os.write(terminal, typed.encode() + b"\t")
        wait_for(terminal, re.escape(becomes))
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


def wait_for(terminal: int, pattern: str, seconds: float = 30.0) -> None:
    """Read what a shell prints until it matches."""
    said, end = "", time.monotonic() + seconds
    while not re.search(pattern, said, re.DOTALL):
        assert time.monotonic() < end, f"no {pattern!r} in {said!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            said += os.read(terminal, 4096).decode(errors="replace")
