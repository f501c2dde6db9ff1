"""Compares two key documents: the typed differences that explain why a node runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from stagegraph.stage import JsonObject
    from stagegraph.store.record import Document

DIGITS = 6  # of a secret's keyed digest: enough to see that it changed


class Change(NamedTuple):
    """One difference. ``kind`` is stage, param, source, input, code, tool or library; ``item`` a file of a source."""

    kind: str
    name: str
    old: Any
    new: Any
    item: str = ""

    @property
    def text(self) -> str:
        """The difference in a few words."""
        if self.kind in {"stage", "tool", "library"}:
            return f"{self.name} {show(self.old)} -> {show(self.new)}"
        if self.kind == "param":
            return f"{self.name}: {show(self.old)} -> {show(self.new)}"
        what = f"{self.name} {self.item}" if self.kind == "source" else f"{self.kind} {self.name}"
        return f"{what} {self.fate}"

    @property
    def fate(self) -> str:
        """How it changed, in words that follow its name."""
        return "is new" if self.old is None else "is gone" if self.new is None else "changed"


def changes(old: Document, new: Document) -> list[Change]:
    """Return the differences between two key documents, the most informative first."""
    identity = ("stage", "version", "schema")
    if any(old[name] != new[name] for name in identity):
        return [Change("stage", "stage", f"{old['stage']} v{old['version']}", f"{new['stage']} v{new['version']}")]
    found = [Change("param", *change) for change in _changed(old["params"], new["params"])]
    for source in sorted({*old["sources"], *new["sources"]}):
        files = _changed(old["sources"].get(source, {}), new["sources"].get(source, {}))
        found += [Change("source", source, before, now, file) for file, before, now in files]
    for section, kind in (("inputs", "input"), ("code", "code"), ("tools", "tool"), ("libraries", "library")):
        found += [Change(kind, *change) for change in _changed(old.get(section, {}), new.get(section, {}))]
    return found


def instances(value: Any) -> Iterator[tuple[tuple[tuple[str, str], ...], str]]:
    """Yield (``foreach`` values, artifact digest) of what one port read; a single input has no values."""
    if isinstance(value, str):
        yield (), value
    else:
        for each, digest in value or ():
            yield tuple(sorted(each.items())), digest


def _changed(old: JsonObject, new: JsonObject) -> list[tuple[str, Any, Any]]:
    names = sorted({*old, *new})
    return [(name, old.get(name), new.get(name)) for name in names if _plain(old.get(name)) != _plain(new.get(name))]


def _plain(value: Any) -> Any:
    """A document read back from JSON has lists where a fresh one has tuples."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def show(value: Any) -> str:
    """Return a value formatted for people."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, Mapping):  # a secret, by its keyed digest (stagegraph.planning.secrets)
        return " ".join(f"{mark}{str(digits)[:DIGITS]}" for mark, digits in value.items())
    return "none" if value is None else str(value)
