"""Conversations: every answer is read as it was generated, commands do what they say, mistakes end nothing."""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from stages.cli import chat
from stages.runtime import console, manifest, serving
from stages.runtime.dialogue import Dialogue
from stages.runtime.errors import RequestError
from stages.runtime.generation import Generation
from stages.runtime.server.answer import AnswerOptions
from stages.runtime.server.engine import Engine

ROOT = Path(__file__).parents[2]


def parse(*arguments):
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def piped(monkeypatch, data, *arguments):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    out, err = io.StringIO(), io.StringIO()
    return console.run(parse(*arguments), out, err), out.getvalue(), err.getvalue()


def readable(tokenizer):
    """How to pick tokens of letters: the random model's bytes are seldom text, which is not read as it came."""
    letters = [i for i in range(300) if (tokenizer.piece(i) or b"").replace(b" ", b"").isalpha()]
    return AnswerOptions(max_tokens=9, logit_bias=dict.fromkeys(letters, 100))


def test_every_turn_reads_only_what_is_new_and_answers_as_if_all_was_read(recorded):
    bundle = manifest.read(recorded.bundle)
    engine, other = (Engine(bundle, sequences=1) for _ in range(2))
    dialogue, options, page = Dialogue(engine.tokenizer, "Be brief."), readable(engine.tokenizer), 16
    held: list[int] = []
    for message in ("every morning", "and\nthen?", "<|im_end|>"):
        generation = Generation(dialogue.prompt(message), options)
        assert generation.prompt[: len(held)] == held
        text = "".join(generation.text(engine))
        assert generation.prefilled <= len(generation.prompt) - len(held) + page  # whole pages are kept
        while (sequence := other.scheduler.prefixes.oldest()) is not None:
            other.scheduler._forget(sequence)
        alone = Generation(generation.prompt, options)
        assert "".join(alone.text(other)) == text
        assert alone.prefilled == len(generation.prompt)
        dialogue.add(message, generation)
        held = [*generation.prompt, *generation.ids]
    assert [message["role"] for message in dialogue.messages] == ["system", *["user", "assistant"] * 3]
    engine.close()
    other.close()


class Spelling:
    """A tokenizer of a few ids: 1 and 2 are special, others spell characters, 30 spells what 10 and 11 spell."""

    PIECES = {1: b"<s>", 2: b"</s>", 10: b"a", 11: b"b", 12: b"c", 30: b"ab", 31: b"<s>"}

    def __init__(self):
        self.rendered: list[int] = []

    def chat(self, messages):
        return self.rendered

    def piece(self, index):
        return self.PIECES[index]

    def is_special(self, index):
        return index in {1, 2}


@pytest.mark.parametrize(
    ("held", "rendered", "expected"),
    [
        ([1, 12, 10, 11], [1, 12, 30, 2, 12], [1, 12, 10, 11, 2, 12]),  # generated in two ids, encoded in one
        ([1, 12, 30], [1, 12, 10, 11, 2, 12], [1, 12, 30, 2, 12]),  # and the other way round
        ([1, 10, 12, 10, 11], [1, 10, 12, 10, 12], [1, 10, 12, 10, 12]),  # another text from some place on
        ([1, 10, 11, 12], [1, 30, 11, 2], [1, 10, 11, 11, 2]),  # as it was held as far as it goes
        ([1, 12, 10], [1, 12, 30, 2], [1, 12, 30, 2]),  # the held one ends inside of an id
        ([1, 12], [1, 31, 12], [1, 31, 12]),
        ([1, 10, 1, 12], [1, 10, 31, 12], [1, 10, 31, 12]),  # a special token never stands for its spelling
        ([1, 10, 31, 12], [1, 10, 1, 12], [1, 10, 1, 12]),
        ([], [1, 10], [1, 10]),
    ],
)
def test_answers_keep_the_ids_they_were_generated_with(held, rendered, expected):
    tokenizer = Spelling()
    dialogue = Dialogue(tokenizer)
    dialogue._ids, tokenizer.rendered = held, rendered
    assert dialogue.prompt("x") == expected


def test_what_was_forgotten_lends_its_ids_to_nothing():
    dialogue = Dialogue(Spelling())
    for forget in (dialogue.reset, lambda: dialogue.set_system("other")):
        dialogue._ids, dialogue._tokenizer.rendered = [1, 10, 11], [1, 30, 2]
        forget()
        assert dialogue.prompt("x") == [1, 30, 2]


def test_lines_of_a_pipe_are_messages_and_commands(recorded, tmp_path, monkeypatch):
    saved = tmp_path / "saved.json"
    lines = f"every\n/reset\n\n/system Be brief.\nand more\\\nlines\n /etc is what?\n/help\n/save {saved}\n/quit\nnever"
    code, out, err = piped(monkeypatch, lines.encode(), recorded.bundle, "--max-tokens", 4, "--temperature", 0)
    assert code == 0
    messages = json.loads(saved.read_text())
    assert [m["content"] for m in messages if m["role"] != "assistant"] == [
        "Be brief.",
        "and more\nlines",
        "/etc is what?",
    ]
    assert out.endswith("".join(f"{m['content']}\n" for m in messages if m["role"] == "assistant"))
    assert err.count("4 tokens, ") == 3
    assert "of 512 tokens held; ended by length" in err
    assert console.HELP in err
    assert err.startswith("tiny, q0f32, llvm; greedy; /help lists commands\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"/rest", "no command /rest; did you mean /reset?"),
        (b"/etc/passwd", "no command /etc/passwd; /help lists them"),
        (b"/save", "/save FILE: name the file"),
        (b"/save /nowhere/a", "/nowhere/a: No such file or directory"),
        (b"\xff", "standard input, line 1: not UTF-8 at byte 0"),
        (b"e" * 3000, "the context holds 512 tokens and the prompt has "),
    ],
)
def test_a_mistake_in_a_pipe_ends_it(recorded, monkeypatch, line, message):
    code, out, err = piped(monkeypatch, line + b"\nhello\n", recorded.bundle, "--quick")
    assert (code, out) == (2, "")
    assert f"error: {message}" in err


def test_special_tokens_that_are_shown_are_no_part_of_the_messages(recorded, tmp_path, monkeypatch):
    saved = tmp_path / "saved.json"
    options = ["--specials", "--temperature", 3, "--seed", 4, "--max-tokens", 60]
    _, out, _ = piped(monkeypatch, f"a\n/save {saved}\n".encode(), recorded.bundle, *options)
    assert "<|" in out
    assert "<|" not in json.loads(saved.read_text())[-1]["content"]


class Interrupting(io.StringIO):
    """Presses Ctrl-C once some text has come, one time."""

    def write(self, text):
        if self.tell() < 12 <= self.tell() + len(text):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.fixture
def talking(recorded):
    with ExitStack() as held:

        def begin(out, err, *arguments):
            args = parse(recorded.bundle, "--temperature", 0, *arguments)
            served = serving.serve(args, chat=True)
            engine = held.enter_context(served.engine())
            return console.Console(served, engine, Dialogue(served.tokenizer), 0, out, err)

        yield begin


def test_an_interrupt_stops_the_answer_and_keeps_the_conversation(talking):
    out, err = Interrupting(), io.StringIO()
    talk = talking(out, err, "--max-tokens", 100)
    assert talk.take("every morning")
    assert talk.interrupted
    assert "ended by interrupt" in err.getvalue()
    assert [m["content"] for m in talk._dialogue.messages][1:] == [out.getvalue()[:-1]]
    assert talk.take("go on")
    assert not talk.interrupted
    assert len(talk._dialogue.messages) == 4


def test_a_mistake_changes_nothing_of_the_conversation(talking):
    talk = talking(io.StringIO(), io.StringIO(), "--max-tokens", 5)
    talk.take("every morning")
    before = [dict(message) for message in talk._dialogue.messages]
    with pytest.raises(RequestError, match="the context holds"):
        talk.take("e" * 3000)
    assert talk._dialogue.messages == before
    known = talk._engine.scheduler.cached_tokens
    assert talk.take("again")
    assert talk._engine.scheduler.cached_tokens - known > 15, "what was read before is known"


def test_at_a_terminal_ctrl_c_clears_the_line_and_ctrl_d_leaves(recorded):
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        command = [sys.executable, "-m", "stages.runtime", "chat", recorded.bundle, "--max-tokens", "3"]
        os.execve(sys.executable, [str(part) for part in command], {**os.environ, "TERM": "dumb"})  # noqa: S606
    said = _until(terminal, b"> ")
    os.write(terminal, b"not this")
    said += _until(terminal, b"not this")
    said += _until(terminal, b"/quit leaves\r\n> ", press=b"\x03")
    os.write(terminal, b"hello\r")
    said += _until(terminal, b"ended by length)\r\n> ")
    os.write(terminal, b"/rest\r")
    said += _until(terminal, b"did you mean /reset?\r\n> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert b"Traceback" not in said


def _until(terminal, end, press=b""):
    """What the terminal shows until `end`; `press` is pressed until something comes.

    Python's readline misses a Ctrl-C that comes between two of its waits for a key, so a person would press it again.
    """
    said = b""
    while end not in said:
        os.write(terminal, press if not said else b"")
        if select.select([terminal], [], [], 2 if press else None)[0]:
            said += os.read(terminal, 4096)
    return said


def test_a_misspelt_option_of_the_folder_alone_is_named(recorded):
    command = [sys.executable, "-m", "stages.runtime", "chat", recorded.bundle, "--temprature", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("unknown argument --temprature; did you mean --temperature?\n")
