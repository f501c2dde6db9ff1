"""Reads ``remotes``: the places where results are shared, as the user's configuration and a pipeline file list them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from stagegraph.spec.model import Remote

if TYPE_CHECKING:
    from stagegraph.spec.item import Item, Problems

# Whether results are taken, and given; ``none`` switches off a remote that a pipeline file lists.
MODES = {"read": (True, False), "write": (False, True), "both": (True, True), "none": (False, False)}
SCHEMES = ("s3", "gs", "az", "sftp", "http", "https", "file")
_SCHEMES = ", ".join(f"{scheme}://" for scheme in SCHEMES)
READ_ONLY = ("http", "https")
KEYS = ("url", "mode")


def read_remotes(
    item: Item | None, problems: Problems, resolve: Callable[[Item], Item | None] = lambda item: item
) -> Iterator[Remote]:
    """Yield the remotes that a mapping lists, in its order; ``resolve`` replaces the references in a value.

    A directory counts from the file that names it. A URL with a password in it is refused, as URLs are shown.
    """
    for name, entry in (problems.mapping(item, "remotes") or {}).items() if item is not None else ():
        fields = problems.mapping(entry, f"remotes.{name}", KEYS) or {}
        if isinstance(entry.value, dict) and "url" not in fields:
            problems.add(entry.place, f"has no url; expected a directory or one of {_SCHEMES}", name)
        url, mode = (resolve(fields[key]) if key in fields else None for key in KEYS)
        if mode is not None and mode.value not in MODES:
            problems.unexpected(mode, " or ".join(MODES), f"remotes.{name}.mode")
        elif url is not None and (where := _address(url, name, problems)):
            reads, writes = MODES[str(mode.value) if mode is not None else "read"]
            if writes and where.startswith(tuple(f"{scheme}:" for scheme in READ_ONLY)):
                problems.unexpected(mode or url, "mode read, the only one of http", f"remotes.{name}.mode")
            yield Remote(name, where, reads, writes)


def _address(url: Item, name: str, problems: Problems) -> str:
    """Return a remote's URL without an end of slashes; empty, with the problem noted, if it is none."""
    where = url.value
    if not isinstance(where, str) or not where:
        problems.unexpected(url, "a URL or a directory", f"remotes.{name}.url")
        return ""
    scheme, colon, _ = where.partition("://")
    if not colon:
        return problems.reads.absolute(url.base / problems.reads.expanded(where)).as_uri()
    if scheme not in SCHEMES:
        problems.unexpected(url, f"a directory or one of {_SCHEMES}", name)
    elif ":" in urlsplit(where).netloc.rpartition("@")[0]:
        text = "has a password in it, which would be kept and shown; expected it in the environment"
        problems.add(url.place, text, f"remotes.{name}.url")
    else:
        return where.rstrip("/")
    return ""
