"""Standard output and error for people: control characters are escaped, and closed streams are survived.

What comes from source files, pipeline files and stages is printed with its control characters written out. Colours of
our own pass on a terminal. The content of a file, in a pipe, stays as it is (:func:`exactly`).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

# C0 without tab and newline, DEL, C1, Unicode's line and paragraph separators, and its Bidi_Control: what turns the
# direction of text round.
CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
CONTROLS = re.compile(f"[{CONTROL}]")
LONGEST = 4000  # characters of a message
BUT_COLOURS = re.compile(rf"(\x1b\[\d*m)|[{CONTROL}]")


def visible(text: str) -> str:
    """Return a text with its control characters written out, as ``\\x1b``."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text) if CONTROLS.search(text) else text


def hanging(text: str) -> str:
    """Return a message whose further lines are indented, so that none of them looks like one of ours.

    What is longer than any that we word, for a stranger's name of thousands of characters is in it, loses its middle.
    """
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"
    return text.replace("\n", "\n  ")


class _Stream:
    """A text stream that escapes control characters; a ``lossy`` one drops what cannot be written, such as progress."""

    def __init__(self, stream: TextIO, *, lossy: bool) -> None:
        self.exact = stream
        self._lossy = lossy

    def write(self, text: str) -> int:
        if self.exact.isatty() and not self._lossy:
            shown = BUT_COLOURS.sub(lambda found: found[1] or ascii(found[0])[1:-1], text)
        else:
            shown = visible(text)
        with self._telling():
            self.exact.write(shown)
        return len(text)

    def flush(self) -> None:
        with self._telling():
            self.exact.flush()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Name standard output in its errors: a full disk there is not the store's."""
        try:
            yield
        except OSError as error:
            if not self._lossy:
                error.filename = "standard output"
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.exact, name)


def exactly(stream: TextIO) -> TextIO:
    """Return the underlying stream, for file contents and for drawing on a terminal."""
    return cast(TextIO, getattr(stream, "exact", stream))


@contextlib.contextmanager
def for_people() -> Iterator[None]:
    """Replace ``sys.stdout`` and ``sys.stderr`` by such streams within the block; closed ones discard their text."""
    for descriptor in (0, 1, 2):  # else the next file that is opened, a database perhaps, would be printed into
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character still gets the rest
    out, err = (stream or open(os.devnull, "w", encoding="utf-8") for stream in before)  # noqa: PTH123, SIM115
    sys.stdout, sys.stderr = cast(TextIO, _Stream(out, lossy=False)), cast(TextIO, _Stream(err, lossy=True))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
