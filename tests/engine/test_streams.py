"""What is printed: no control character of a name or a message, no forged line; closed and full streams."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from stagegraph.cli.streams import visible
from tests.engine.test_faults import command
from tests.support.demo import Demo

ODD = "\\x1b]0;owned\\x07\\x1b[2J\\u202egnp\\u061c\\u200e\\u200f\\u2028\\nerror: forged: all is lost"
# Control characters, separators of lines, and what turns the direction of text round, by Unicode's own words.
TURNS = ("-TO-RIGHT", "-TO-LEFT", "DIRECTIONAL", "ISOLATE", "ARABIC LETTER MARK")
EVERY = [
    c
    for c in map(chr, range(sys.maxunicode + 1))
    if (kind := unicodedata.category(c)) in {"Zl", "Zp"}
    or (kind == "Cc" and c not in "\t\n")
    or (kind == "Cf" and any(word in unicodedata.name(c, "") for word in TURNS))
]
RAW = re.compile(f"[{''.join(EVERY)}]")


@pytest.fixture
def odd(demo: Demo) -> Demo:
    demo.edit("read", 'ctx.summary(f"', f'ctx.warn("{ODD}"); ctx.summary(f"{ODD}')
    demo.edit("read", 'StageError("the', f'StageError("{ODD} the')
    assert demo.run().code == 0
    return demo


def test_no_verb_passes_control_characters_or_forged_lines(odd: Demo) -> None:
    odd("run", str(odd.pipeline), "--force")
    odd.source.write_text("FAIL")
    verbs = (["run"], ["status"], ["show", "read"], ["runs"], ["runs", "--run", "@~0"], ["explain", "read"], ["graph"])
    for verb, *rest in (*verbs, ["lineage", "read"], ["diff", "read", "read"], ["du"], ["gc", "--dry-run"], ["fsck"]):
        for more in ([], ["--json"]):
            words = [*rest[:1], str(odd.pipeline), *rest[1:]] if rest[:1] == ["read"] else [*rest, str(odd.pipeline)]
            said = odd(verb, *words, *more) if verb != "diff" else odd(verb, *rest, str(odd.pipeline), *more)
            assert not RAW.search(said.out + said.err), (verb, said)
            assert not re.search("^error: forged", said.out + said.err, re.MULTILINE), (verb, said)


def test_every_character_that_moves_or_turns_text_is_written_out() -> None:
    assert len(EVERY) == 77
    for character in EVERY:
        assert visible(f"a{character}b") == f"a{ascii(character)[1:-1]}b"
    kept = "\t\n\u200b\u200c\u200d\ufeffé你\U0001f468\u200d\U0001f469"
    assert visible(kept) == kept


def test_arguments_are_not_passed_through(demo: Demo) -> None:
    file = str(demo.pipeline)
    for words in (
        ["run", file, "--stage", "\x1b[31mx"],
        ["run", file, "--set", "vars.\x1b[31m=1"],
        ["\x1b[31mverb"],
        ["show", "a\x1b[2J", file],
    ):
        said = demo(*words)
        assert said.code == 2
        assert "\\x1b" in said.err
        assert not RAW.search(said.out + said.err)


def test_a_file_is_printed_as_it_is_in_a_pipe(demo: Demo) -> None:
    demo.edit("read", '"a page\\n"', '"\\x1b[31mred\\n"')
    demo.run()
    assert demo("show", "read", str(demo.pipeline), "--view", "page").out == "\x1b[31mred\n"


def started(demo: Demo, **streams: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{demo.package.parent}{os.pathsep}{Path(__file__).parents[2]}"}
    return subprocess.run(command(demo), check=False, env=env, text=True, errors="replace", timeout=120, **streams)


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams_cost_no_work(demo: Demo, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    started(demo, preexec_fn=close)
    assert demo.counts == ["join", "read", "shape[column]", "shape[line]"]
    assert set(demo.run().outcomes.values()) == {"HIT"}


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_full_streams_cost_no_work(demo: Demo, full: str) -> None:
    with Path("/dev/full").open("w") as target:
        done = started(demo, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: target})
    assert demo.counts == ["join", "read", "shape[column]", "shape[line]"]
    assert done.returncode == (3 if full == "stdout" else 0)
    if full == "stdout":
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr


def test_names_that_are_not_utf8(demo: Demo) -> None:
    odd = os.fsdecode(os.fsencode(demo.source.parent) + b"/\xff.txt")
    Path(odd).write_text("words")
    refused = demo.run()
    assert (refused.code, "the file name" in refused.err) == (2, True)
    Path(odd).unlink()
    folder = os.fsdecode(os.fsencode(demo.folder) + b"/\xff")
    Path(folder).mkdir()
    moved = Path(folder) / "pipeline.yaml"
    demo.pipeline.rename(moved)
    (Path(folder) / "words").symlink_to(demo.source.parent)
    assert demo("run", str(moved)).code == 0
    for verb in (["status"], ["show", "read"], ["lineage", "read"], ["explain", "read"]):
        for more in ([], ["--json"]):
            assert demo(*verb, str(moved), *more).code == 0
    for setting in ("vars.glue=\udcff", "vars.\udcff=1", "\udcff"):
        assert demo("run", str(moved), "--set", setting).code in {0, 1, 2}
    assert demo("show", "\udcff", str(moved)).code == 2
