"""A pipeline file and the files it extends, overlaid into one tree of items that keep their own places."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stagegraph.errors import nearest
from stagegraph.files import open_regular
from stagegraph.spec.model import Place
from stagegraph.spec.reader import parse

if TYPE_CHECKING:
    from pathlib import Path

    from stagegraph.spec.item import Item, Problems

KEYS = "a mapping with the keys of a pipeline: version, name, stages"
_BYTES_LIMIT = 4 << 20  # a pipeline of 30,000 entries has half as many


def read_layers(path: Path, problems: Problems) -> dict[str, Item]:
    """Return the keys of the file at ``path`` overlaid on those of the files it extends, ``extends`` itself removed.

    Raises :class:`SpecError` at once where a file cannot be read: what it would have said is not known then.
    """
    opened = {os.path.realpath(path): path}
    layers = [_read(path, Place(shown(path)), problems)]
    while (base := layers[-1].pop("extends", None)) is not None:
        if not isinstance(base.value, str) or not base.value or "\0" in base.value:
            problems.unexpected(base, "the path of another pipeline file", "extends")
            raise problems.error()
        below = path.parent / base.value
        if os.path.realpath(below) in opened:
            trail = [shown(file) for file in [*opened.values(), below]]
            text = f"files extend each other in a circle: {' -> '.join(trail)}; expected one that ends"
            problems.add(base.place, text)
            raise problems.error()
        opened[os.path.realpath(below)] = path = below
        layers.append(_read(path, base.place, problems))
    merged = layers.pop()
    while layers:
        merged = _overlay(merged, layers.pop())
    return merged


def shown(path: Path) -> str:
    """Return a path as messages print it: as it was given, but relative when it is below the working directory."""
    plain = os.path.normpath(path)
    here = os.getcwd() + os.sep  # noqa: PTH109 - compared as text
    return plain.removeprefix(here)


def _read(path: Path, named_at: Place, problems: Problems) -> dict[str, Item]:
    """Return the top-level keys of one file; raise with all problems so far if it cannot be read."""
    name = shown(path)
    text = _text(path, name, named_at, problems)
    if text is not None:
        base = problems.reads.absolute(path.parent)
        item = parse(text, lambda line, column: Place(name, line, column), base, problems)
        if item is not None and isinstance(item.value, dict):
            return item.value
        if item is not None and item.value is None:
            problems.add(item.place, f"is empty; expected {KEYS}")
        elif item is not None:
            problems.unexpected(item, KEYS)
    raise problems.error()


def _text(path: Path, name: str, named_at: Place, problems: Problems) -> str | None:
    try:
        with open_regular(path) as file:
            data = file.read(_BYTES_LIMIT + 1)
    except OSError as error:
        about = "" if named_at.file == name else f"{name}: "
        problems.add(named_at, f"{about}{_unreadable(path, error, named_at)}")
        return None
    if len(data) > _BYTES_LIMIT:
        problems.add(Place(name), f"is larger than {_BYTES_LIMIT >> 20} MiB; expected a pipeline file")
        return None
    problems.reads.files[str(path.absolute())] = data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        column = len(data[line_start : error.start].decode("utf-8", "replace")) + 1
        place = Place(name, data.count(b"\n", 0, line_start) + 1, column)
        problems.add(place, f"byte 0x{data[error.start]:02X} is not UTF-8; expected a text file")
        return None


def _unreadable(path: Path, error: OSError, named_at: Place) -> str:
    """Say why a file cannot be read and what may have been meant."""
    if isinstance(error, IsADirectoryError) or os.path.isdir(path):  # noqa: PTH112 - False for a name no file can have
        return "is a folder; expected a pipeline file"
    if not isinstance(error, FileNotFoundError):
        return f"{error.strerror}; expected a pipeline file"
    beside = {file.name for suffix in ("yaml", "yml") for file in path.parent.glob(f"[!.]*.{suffix}")}
    if beside := beside - {os.path.basename(named_at.file)}:  # noqa: PTH119 - a text
        return f"no such file{nearest(path.name, beside)}"
    if str(path) == "pipeline.yaml":
        return "no such file, nor in a folder above; `pipeline init` writes one"
    return "no such file; expected a pipeline file"


def _overlay(base: dict[str, Item], over: dict[str, Item]) -> dict[str, Item]:
    """Merge mappings key by key; everything else in ``over`` replaces what ``base`` has."""
    merged = dict(base)
    for name, item in over.items():
        below = base.get(name)
        if below is not None and isinstance(below.value, dict) and isinstance(item.value, dict):
            merged[name] = below._replace(value=_overlay(below.value, item.value))
        else:
            merged[name] = item
    return merged
