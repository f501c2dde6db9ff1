"""The page for people at /: plain HTML, CSS and modules, which load nothing from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

INDEX = "index.html"
# Nothing runs, loads or is sent to but what comes from here, and no other page may show this one.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class File:
    """One file of the page, and its media type."""

    name: str
    kind: str

    def content(self) -> bytes:
        """Return its bytes."""
        return Path(__file__).with_name(self.name).read_bytes()


FILES = {
    file.name: file
    for file in (
        File(INDEX, "text/html"),
        File("style.css", "text/css"),
        File("chat.js", "text/javascript"),
        File("api.js", "text/javascript"),
    )
}
