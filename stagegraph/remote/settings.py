"""The user's own configuration: remotes, and whose signatures are believed.

```yaml
remotes:
  team: {url: "s3://bucket/stagegraph", mode: both}   # mode: read (default), write or both
  disk: {url: /mnt/share/stagegraph}
trusted:
  build-server: 5a1c...                               # what `pipeline remote key` prints there
```

It is one file, ``$STAGEGRAPH_CONFIG`` or ``~/.config/stagegraph/config.yaml``, and never the pipeline file: who checks
out a repository does not thereby believe whom it names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from stagegraph.errors import SpecError
from stagegraph.spec.item import Item, Problems
from stagegraph.spec.model import Place
from stagegraph.spec.reader import parse

MODES = {"read": (True, False), "write": (False, True), "both": (True, True)}  # reads, writes
SCHEMES = ("s3", "gs", "az", "http", "https", "file")
READ_ONLY = ("http", "https")
PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")


class Remote(NamedTuple):
    """A place with results: its name, where it is (a URL), and whether results are taken from it and given to it."""

    name: str
    url: str
    reads: bool
    writes: bool


class Settings(NamedTuple):
    """Remotes in the order in which they are asked, and name -> public key (hexadecimal) of whom is believed."""

    remotes: tuple[Remote, ...] = ()
    trusted: Mapping[str, str] = {}


def config_path() -> Path:
    """Return where the user's configuration is, whether or not it exists."""
    if named := os.environ.get("STAGEGRAPH_CONFIG"):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "stagegraph" / "config.yaml"


def load_settings() -> Settings:
    """Return what the user configured, nothing if there is no file; :class:`SpecError` with all that is wrong in it."""
    path = config_path()
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: {error}") from None
    problems = Problems()
    top = parse(text, lambda line, column: Place(str(path), line, column), path.parent, problems)
    found = problems.mapping(top, str(path), ("remotes", "trusted")) if top is not None and top.value else {}
    remotes = list(_remotes((found or {}).get("remotes"), problems))
    trusted = dict(_trusted((found or {}).get("trusted"), problems))
    problems.check()
    return Settings(tuple(remotes), trusted)


def _remotes(item: Item | None, problems: Problems) -> Iterator[Remote]:
    for name, entry in (problems.mapping(item, "remotes") or {}).items() if item is not None else ():
        fields = problems.mapping(entry, f"remotes.{name}", ("url", "mode")) or {}
        if "url" not in fields:
            problems.add(entry.place, "has no url; expected s3://, gs://, az://, https:// or a directory", name)
            continue
        url, mode = fields["url"], fields.get("mode")
        where = url.value
        if not isinstance(where, str) or not where:
            problems.unexpected(url, "a URL or a directory", f"remotes.{name}.url")
            continue
        scheme, colon, _ = where.partition("://")
        if colon and scheme not in SCHEMES:
            problems.unexpected(url, f"a directory or one of {', '.join(f'{s}://' for s in SCHEMES)}", name)
        if mode is not None and mode.value not in MODES:
            problems.unexpected(mode, " or ".join(MODES), f"remotes.{name}.mode")
            continue
        reads, writes = MODES[str(mode.value) if mode is not None else "read"]
        if writes and colon and scheme in READ_ONLY:
            problems.unexpected(mode or url, "mode read, the only one of http", f"remotes.{name}.mode")
        if not colon:
            where = (url.base / Path(where).expanduser()).absolute().as_uri()
        yield Remote(name, where.rstrip("/"), reads, writes)


def _trusted(item: Item | None, problems: Problems) -> Iterator[tuple[str, str]]:
    for name, entry in (problems.mapping(item, "trusted") or {}).items() if item is not None else ():
        if isinstance(entry.value, str) and PUBLIC_KEY.fullmatch(entry.value):
            yield name, entry.value
        else:
            problems.unexpected(entry, "a public key of 64 hexadecimal digits, in quotes", f"trusted.{name}")
