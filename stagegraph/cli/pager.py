"""Texts on a terminal: highlighted by what they are, and through the pager where they are longer than the screen."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from stagegraph.cli.common import coloured, size_text

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
    """Print a text, plain in a pipe; ``name`` is a file name that says by its suffix how to highlight it."""
    if coloured() and name.endswith((".py", ".json", ".yaml", ".md")) and len(text) < PLAIN_FROM:
        text = _highlighted(text, name)
    pager = shlex.split(os.environ.get("PAGER") or PAGER)
    if sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines and shutil.which(pager[0]):
        subprocess.run(pager, input=text.encode(errors="replace"), check=False)
    else:
        print(text, end="" if text.endswith("\n") else "\n")


def _highlighted(text: str, name: str) -> str:
    from rich.console import Console
    from rich.syntax import Syntax

    console = Console(force_terminal=True)
    syntax = Syntax(text, Syntax.guess_lexer(name), theme="ansi_dark", background_color="default", word_wrap=True)
    with console.capture() as capture:
        console.print(syntax)
    return capture.get()


def describe_binary(path: Path) -> str:
    """Say what a file that is no text seems to be, how large it is, and how it begins."""
    with path.open("rb") as file:
        head = file.read(16)
    kind = next((what for magic, what in MAGIC.items() if head.startswith(magic)), "binary data")
    return f"{size_text(path.stat().st_size)}, {kind}, begins {head.hex(' ')}"
