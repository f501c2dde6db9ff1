"""A stage's parameters as data: what its ``Params`` declares, and values of a pipeline file read into it."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, NamedTuple

from stagegraph.errors import PipelineError, nearest
from stagegraph.registry import load_object
from stagegraph.spec.item import Item, Problems, Scalar, found
from stagegraph.stage import Secret, Source

if TYPE_CHECKING:
    from collections.abc import Collection

    from stagegraph.stage import Stage

_ANNOTATION = re.compile(
    r"(?P<scalar>str|int|float|bool|Source)"
    r"|list\[(?P<list>str|int|float|bool|Source)\]"
    r"|tuple\[(?P<tuple>str|int|float|bool|Source), ?\.\.\.\]"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_EXPECTED = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "Source": "a path",
}


class Param(NamedTuple):
    """One declared parameter; ``kind`` is the type of the value, or of each element where ``many``."""

    name: str
    kind: str
    many: bool
    nullable: bool
    default: Any
    doc: str
    choices: Collection[str] | str | None
    minimum: int | None
    references: Collection[str]

    @property
    def required(self) -> bool:
        """Whether a pipeline must give it."""
        return self.default is MISSING

    @property
    def expected(self) -> str:
        """What a value of it is, in words."""
        element = _EXPECTED[self.kind]
        return ("a list, each " + element if self.many else element) + (" or null" if self.nullable else "")

    def names(self) -> Collection[str] | None:
        """Return the allowed names, reading the table that declares them; ``None`` where any value is allowed."""
        return load_object(self.choices).keys() if isinstance(self.choices, str) else self.choices


@functools.cache
def declared(stage: Stage) -> dict[str, Param]:
    """Return the parameters of a stage by name, in the order they are declared."""
    return {field.name: _declaration(stage, field) for field in dataclasses.fields(stage.Params)}


def _declaration(stage: Stage, field: dataclasses.Field[Any]) -> Param:
    annotation = field.type if isinstance(field.type, str) else _spelt(field.type)
    alternatives = [part.strip() for part in annotation.split("|")]
    match = _ANNOTATION.fullmatch(next((part for part in alternatives if part != "None"), ""))
    if match is None or len(alternatives) > 2 or (len(alternatives) == 2 and "None" not in alternatives):
        raise PipelineError(
            f"stage '{stage.id}': parameter '{field.name}' is declared as {annotation}; "
            "expected str, int, float, bool, Source, a list[...] or tuple[..., ...] of one, or one of these | None"
        )
    about = field.metadata
    return Param(
        field.name,
        kind=match[match.lastgroup or 0],
        many=match.lastgroup != "scalar",
        nullable="None" in alternatives,
        default=field.default,
        doc=about.get("doc", ""),
        choices=about.get("choices"),
        minimum=about.get("minimum"),
        references=about.get("references", ()),
    )


def _spelt(annotation: Any) -> str:
    """Return the text of an annotation that was evaluated, in a module without postponed evaluation."""
    plain = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return plain.replace(f"{Source.__module__}.", "")


def read(param: Param, item: Item, problems: Problems, subject: str) -> Any:
    """Return the typed value of a parameter, lists as tuples and sources as absolute paths; note what is wrong with it.

    After a problem the value returned is of no use.
    """
    if item.value is None and param.nullable:
        return None
    if not param.many:
        return _element(param, item, problems, subject)
    if not isinstance(item.value, list):
        problems.unexpected(item, param.expected, subject)
        return ()
    return tuple(_element(param, part, problems, subject) for part in item.value)


def _element(param: Param, item: Item, problems: Problems, subject: str) -> Scalar:
    value = item.value
    if isinstance(value, Secret) and (param.kind != "str" or param.choices is not None):
        problems.unexpected(item, param.expected + ", which is shown", subject)
        return None
    if isinstance(value, list | dict) or not _fits(param.kind, value):
        expected = _EXPECTED[param.kind] if param.many else param.expected
        quotes = ", in quotes" if param.kind == "str" and not isinstance(value, list | dict | None) else ""
        problems.unexpected(item, expected + quotes, subject)
        return None
    names = param.names()
    if names is not None and value not in names:
        problems.add(item.place, f"unknown value {_quoted(value)}{nearest(str(value), map(str, names))}", subject)
    if param.minimum is not None and isinstance(value, int | float) and not value >= param.minimum:
        problems.unexpected(item, f"at least {param.minimum}", subject)
    if param.kind == "Source":
        return _source(param, item, problems, subject)
    return float(value) if param.kind == "float" and isinstance(value, int) else value


def _fits(kind: str, value: Scalar) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == "bool" and value is not None
    if isinstance(value, int):
        return kind == "int" or (kind == "float" and abs(value) < 1 << 1023)
    return kind == "float" if isinstance(value, float) else kind in {"str", "Source"}


def _source(param: Param, item: Item, problems: Problems, subject: str) -> Source:
    path = str(item.value)
    if not path and param.default == "":
        return Source("")
    if not path or "\0" in path:
        problems.unexpected(item, "the path of a file or directory", subject)
        return Source("")
    if _URL.match(path):
        return Source(path)
    return Source(problems.reads.absolute(item.base / problems.reads.expanded(path)))


def _quoted(value: Scalar) -> str:
    return f"'{value}'" if isinstance(value, str) else found(value).removeprefix("the number ")
