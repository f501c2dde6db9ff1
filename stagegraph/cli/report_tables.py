"""Tables and Markdown as HTML, for the page of ``pipeline report``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from stagegraph.cli.streams import visible


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Return a table; the columns in ``right`` are flush right."""

    def line(cells: Sequence[str], tag: str) -> str:
        classes = [' class="right"' if i in right else "" for i in range(len(cells))]
        return (
            "<tr>"
            + "".join(f"<{tag}{c}>{escape(visible(t))}</{tag}>" for c, t in zip(classes, cells, strict=True))
            + "</tr>"
        )

    head = line(header, "th") if any(header) else ""
    return f'<div class="scroll"><table>{head}{"".join(line(row, "td") for row in rows)}</table></div>'


def markdown(text: str, most: int = 0) -> str:
    """Return a view as HTML: its tables, headings and lists as such, what is laid out with spaces as it is written.

    With ``most``, of a table that has more rows than that only the first ones, and how many more there are.
    """
    parts: list[str] = []
    for block in re.split(r"((?:^\|.*\|[ ]*$\n?)+|^#+ .*$\n?)", text, flags=re.MULTILINE):
        if block.startswith("|"):
            lines = [
                [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in block.splitlines()
            ]
            header, rule, *rows = lines if len(lines) > 1 else [*lines, []]
            right = frozenset(i for i, dashes in enumerate(rule) if dashes.endswith(":"))
            more = len(rows) - most if most else 0
            shown = rows[:most] if more > 0 else rows
            parts.append(table(header, [(row + [""] * len(header))[: len(header)] for row in shown], right))
            parts.append(f'<p class="more">and {more} more</p>' if more > 0 else "")
        elif block.startswith("#"):
            parts.append(f"<h4>{escape(visible(block.lstrip('# ').strip()))}</h4>")
        elif block.strip():
            parts.append(_text(visible(block.strip("\n"))))
    return "".join(parts)


def _text(text: str) -> str:
    """Return lists and sentences as such; what is laid out with spaces stays as it is."""
    if re.search(r"^ |\S  ", text, re.MULTILINE):
        return f"<pre>{escape(text)}</pre>"
    parts = []
    for paragraph in filter(str.strip, re.split(r"\n{2,}|\n(?=- )", text)):
        item = paragraph.startswith("- ")
        inside = escape(paragraph.removeprefix("- ")).replace("\n", "<br>")
        parts.append(f"<li>{inside}</li>" if item else f"<p>{inside}</p>")
    return re.sub(r"(?:<li>.*?</li>)+", lambda found: f"<ul>{found[0]}</ul>", "".join(parts))
