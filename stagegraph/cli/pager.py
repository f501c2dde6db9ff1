"""Shows text on a terminal: folded, highlighted by its format, and through the pager if longer than the screen.

In a pipe a text stays as it is, for other programs to read.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from stagegraph.cli.common import size_text
from stagegraph.cli.layout import coloured, folded, markdown, terminal_width
from stagegraph.cli.streams import exactly, visible

PAGER = "less -FRX"
# First bytes of a file -> what it is.
MAGIC = {
    b"\x7fELF": "an ELF binary (shared library or object)",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip data",
    b"\x89PNG": "a PNG image",
    b"SQLite format 3": "an SQLite database",
}
PLAIN_FROM = 1 << 20  # characters; highlighting more would take longer than reading it


def page(text: str, name: str = "") -> None:
    """Print a text, plain in a pipe; ``name`` is that of a file, whose suffix says how to highlight it."""
    if not sys.stdout.isatty():
        content = text.removesuffix("\n") + "\n"
        (exactly(sys.stdout) if name else sys.stdout).write(content)
        return
    text = visible(text)
    if len(text) < PLAIN_FROM:
        text = _laid_out(text, name)
    text = text.removesuffix("\n") + "\n"
    pager = shlex.split(os.environ.get("PAGER") or PAGER)
    if text.count("\n") >= shutil.get_terminal_size().lines and shutil.which(pager[0]):
        subprocess.run(pager, input=text.encode(errors="replace"), check=False)
    else:
        print(text, end="")


def _laid_out(text: str, name: str) -> str:
    width = terminal_width()
    if name.endswith(".md"):
        text = markdown(text, width)
    if not name.endswith(".json"):  # a fold in a string would not be JSON any more
        text = folded(text, width)
    return _highlighted(text, name) if coloured() and name.endswith((".py", ".json", ".yaml")) else text


def _highlighted(text: str, name: str) -> str:
    from rich.console import Console
    from rich.syntax import Syntax

    console = Console(force_terminal=True)
    syntax = Syntax("", Syntax.guess_lexer(name), theme="ansi_dark", background_color="default")
    with console.capture() as capture:
        console.print(syntax.highlight(text), soft_wrap=True, end="")
    return capture.get()


def describe_binary(path: Path) -> str:
    """Describe a binary file: its likely format, its size and its first bytes."""
    with path.open("rb") as file:
        head = file.read(16)
    kind = next((what for magic, what in MAGIC.items() if head.startswith(magic)), "binary data")
    return f"{size_text(path.stat().st_size)}, {kind}, begins {head.hex(' ')}"
