"""The command that holds a conversation, at a terminal or through pipes, for ``python -m`` and the verb ``chat``."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from stages.runtime import serving
from stages.runtime.dialogue import Dialogue
from stages.runtime.errors import RequestError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from stages.runtime.generation import Generation
    from stages.runtime.server.engine import Engine

HELP = """\
/reset          forget what was said, but for the system message
/system TEXT    another system message from now on; without TEXT the model's own
/save FILE      write the messages to FILE as JSON
/help           these lines
/quit           leave, as Ctrl-D does
A line that ends in \\ goes on in the next; one that begins with a space is no
command.
Ctrl-C stops an answer; what was said so far stays part of the conversation.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    serving.bundle_argument(parser)
    serving.add_arguments(parser, max_tokens=f"the checkpoint's, or {serving.CHAT_TOKENS}")


def run(args: argparse.Namespace, *streams: TextIO) -> int:
    """Run the command: answers go to stdout as they are made, all else to stderr, or to the two ``streams``.

    Returns 0, 2 for a bundle or a piped message that cannot be served, 130 after Ctrl-C outside of a terminal, or 141
    where the reader of the answers has gone.
    """
    return serving.guarded(_run, args, *streams)


def _run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    served = serving.serve(args, chat=True)
    if sys.stdin is None:
        raise RequestError("standard input is closed: there is nobody to talk with")
    dialogue = Dialogue(served.tokenizer, serving.text(args.system, "--system") if args.system else None)
    dialogue.prompt("Hello")  # a bundle that cannot chat is refused before its weights are read
    with served.engine() as engine:
        return _talk(Console(served, engine, dialogue, args.seed, out, err), err)


def _talk(console: Console, err: TextIO) -> int:
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    for line in _typed(err) if terminal else _piped():
        try:
            if not console.take(line):
                break
        except RequestError as error:
            if not terminal:  # what comes next counts on what went wrong
                raise
            err.write(f"{error}\n")
        if console.interrupted and not terminal:
            return serving.INTERRUPTED
    return 0


class Console:
    """Takes lines, messages or commands, and writes answers; ``interrupted`` says how the last answer ended."""

    def __init__(
        self, served: serving.Served, engine: Engine, dialogue: Dialogue, seed: int, out: TextIO, err: TextIO
    ) -> None:
        bundle = served.manifest
        self._options, self._engine, self._dialogue = served.options, engine, dialogue
        self._seed, self._out, self._err = seed, out, err
        self.interrupted = False
        err.write(
            f"{bundle.name}, {bundle.model['scheme']}, {bundle.target}; {served.sampling}; /help lists commands\n"
        )

    def take(self, line: str) -> bool:
        """Answer a message or obey a command; False if the conversation is over."""
        serving.text(line, "the message")
        name, _, argument = line.strip().partition(" ")
        if not line.startswith("/"):
            if name:
                self._answer(line.removeprefix(" ") if name.startswith("/") else line)
            return True
        if name not in _COMMANDS:
            import difflib  # only a mistake pays for it

            close = difflib.get_close_matches(name, _COMMANDS, n=1, cutoff=0.6)
            advice = f"did you mean {close[0]}?" if close else "/help lists them; with a space before it is a message"
            raise RequestError(f"no command {name}; {advice}")
        if name != "/quit":
            _COMMANDS[name](self, argument.strip())
        return name != "/quit"

    def _answer(self, message: str) -> None:
        from stages.runtime.generation import Generation

        with serving.interrupts() as interrupted:
            generation = Generation(self._dialogue.prompt(message), self._options, self._seed, interrupted)
            for piece in generation.text(self._engine):
                self._out.write(piece)
                self._out.flush()
        self._seed += 1 << 64  # no other answer of this seed, or of one near, is drawn alike
        self._out.write("\n")
        self._out.flush()
        if generation.ids or generation.finish != "interrupt":  # stopped before its first word, nothing was said
            self._dialogue.add(message, generation)
        self.interrupted = generation.finish == "interrupt"
        self._err.write(f"({self._summary(generation)})\n")

    def _summary(self, generation: Generation) -> str:
        rate = f", {generation.decode_rate:.1f} tokens/s" if generation.decode_steps else ""
        limit, count = self._engine.limit, len(generation.prompt) + len(generation.ids)
        room = f"{count:,} tokens" if limit is None else f"{count:,} of {limit:,} tokens"
        end = "" if generation.finish == "stop" else f"; ended by {generation.finish}"
        return f"{len(generation.ids)} tokens{rate}; {room} held{end}"

    # Commands

    def reset(self, _argument: str) -> None:
        """Forget what was said, but for the system message."""
        self._dialogue.reset()

    def system(self, content: str) -> None:
        """Replace the system message."""
        self._dialogue.set_system(content or None)

    def save(self, name: str) -> None:
        """Write the messages to a file."""
        if not name:
            raise RequestError("/save FILE: name the file to write")
        path = Path(name).expanduser()
        try:
            path.write_text(json.dumps(self._dialogue.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path}: {error.strerror}") from None
        self._err.write(f"{len(self._dialogue.messages)} messages in {path}\n")

    def help(self, _argument: str) -> None:
        """Say what the commands are."""
        self._err.write(HELP)


_COMMANDS: dict[str, Callable[[Console, str], None]] = {
    "/reset": Console.reset,
    "/system": Console.system,
    "/save": Console.save,
    "/help": Console.help,
    "/quit": lambda _console, _argument: None,
}


def _typed(err: TextIO) -> Iterator[str]:
    """Yield what is typed at a terminal, with the history and keys of readline where Python has it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is there

    while True:
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input(". ")
        except EOFError:
            err.write("\n")
            return
        except KeyboardInterrupt:
            err.write("\nCtrl-D or /quit leaves\n")
        except UnicodeDecodeError as error:
            err.write(f"the message: not UTF-8 at byte {error.start}\n")
        else:
            yield line


def _piped() -> Iterator[str]:
    """Yield the lines of standard input, those put together whose end is a backslash."""
    unfinished = ""
    for number, data in enumerate(sys.stdin.buffer, start=1):
        line = unfinished + serving.text_of(data, f"standard input, line {number}").rstrip("\r\n")
        unfinished = line[:-1] + "\n" if line.endswith("\\") else ""
        if not unfinished:
            yield line
    if unfinished:
        yield unfinished.removesuffix("\n")
