"""The ``stages`` of a pipeline file: each entry's keys, the stage it uses, and the entries it needs."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, NamedTuple

from stagegraph.errors import PipelineError, nearest
from stagegraph.registry import get_stage, names
from stagegraph.spec import params
from stagegraph.spec.cycles import circle, order

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stagegraph.spec.item import Item, Problems
    from stagegraph.spec.model import Place
    from stagegraph.spec.scope import Scope
    from stagegraph.stage import Stage

ENTRY_KEYS = ("uses", "needs", "with", "foreach", "resources", "timeout")
ENTRY_NAME = re.compile(r"[a-z0-9-]+")


class Entry(NamedTuple):
    """An entry whose keys are checked and whose values are still as written; ``stage`` is ``None`` if unknown."""

    name: str
    place: Place
    uses: str
    stage: Stage | None
    needs: Mapping[str, Place]
    given: Mapping[str, Item]
    foreach: Item | None
    resources: Item | None
    timeout: Item | None


def read_entries(stages: Mapping[str, Item], scope: Scope, problems: Problems) -> list[Entry]:
    """Return the entries in the order written, noting whatever is wrong with their keys and with what they name."""
    reader = _Reader(stages, scope, problems)
    entries = [entry for name, item in stages.items() if (entry := reader.entry(name, item)) is not None]
    _check_cycles(entries, problems)
    return entries


class _Reader:
    def __init__(self, stages: Mapping[str, Item], scope: Scope, problems: Problems) -> None:
        self._stages, self._scope, self._problems = stages, scope, problems

    def entry(self, name: str, item: Item) -> Entry | None:
        if not ENTRY_NAME.fullmatch(name):
            text = f"'{name}' cannot name an entry; expected lower-case letters, digits and hyphens"
            self._problems.add(item.named_at, text)
        body = self._problems.mapping(item, name, ENTRY_KEYS)
        if body is None:
            return None
        uses, stage = self._stage(name, item.named_at, body.get("uses"))
        given = self._problems.mapping(body["with"], f"{name}.with") if "with" in body else {}
        if stage is not None and given is not None:
            self._check_params(stage, given, body["with"].named_at if "with" in body else item.named_at)
        return Entry(
            name,
            item.named_at,
            uses,
            stage,
            self._needs(name, body.get("needs")),
            given or {},
            body.get("foreach"),
            body.get("resources"),
            body.get("timeout"),
        )

    def _stage(self, name: str, place: Place, uses: Item | None) -> tuple[str, Stage | None]:
        """Return the id of the stage that an entry uses, by default that of its own name, and the stage."""
        if uses is not None:
            resolved = self._scope.resolve(uses)
            if resolved is None:
                return name, None
            if not isinstance(resolved.value, str):
                self._problems.unexpected(resolved, "the name of a stage", f"{name}.uses")
                return name, None
            name, place = resolved.value, resolved.place
        try:
            return name, get_stage(name)
        except KeyError:
            self._problems.add(place, f"unknown stage '{name}'{nearest(name, names('stages'))}")
        except Exception as error:  # noqa: BLE001 - a stage's module is the user's to edit; anything may be in it
            kind = "" if isinstance(error, PipelineError | ImportError) else f"{type(error).__name__}: "
            self._problems.add(place, f"stage '{name}' cannot be loaded: {kind}{error}")
        return name, None

    def _check_params(self, stage: Stage, given: Mapping[str, Item], place: Place) -> None:
        declared = params.declared(stage)
        for key, value in given.items():
            if key not in declared:
                hint = nearest(key, declared) or "; it has none"
                self._problems.add(value.named_at, f"unknown parameter '{key}' of stage '{stage.id}'{hint}")
        for param in declared.values():
            if param.required and param.name not in given:
                text = f"missing parameter '{param.name}' of stage '{stage.id}'; expected {param.expected}: {param.doc}"
                self._problems.add(place, text)

    def _needs(self, name: str, given: Item | None) -> dict[str, Place]:
        resolved = self._scope.resolve(given) if given is not None else None
        if resolved is None:
            return {}
        subject = f"{name}.needs"
        if not isinstance(resolved.value, list):
            self._problems.unexpected(resolved, "a list of entries", subject)
            return {}
        needs: dict[str, Place] = {}
        for need in resolved.value:
            if not isinstance(need.value, str):
                self._problems.unexpected(need, "the name of an entry", subject)
            elif need.value == name:
                self._problems.add(need.place, f"'{name}' needs itself; expected other entries", subject)
            elif need.value not in self._stages:
                self._problems.add(
                    need.place, f"unknown entry '{need.value}'{nearest(need.value, self._stages)}", subject
                )
            elif need.value in needs:
                self._problems.add(need.place, f"'{need.value}' is listed twice; expected each entry once", subject)
            else:
                needs[need.value] = need.place
        return needs


def _check_cycles(entries: list[Entry], problems: Problems) -> None:
    needs = {entry.name: entry.needs for entry in entries}
    known = {name: [need for need in needed if need in needs] for name, needed in needs.items()}
    for cycle in order(known)[1]:
        edges = list(itertools.pairwise([*cycle, cycle[0]]))
        places = ", ".join(f"{name} needs {need}: {needs[name][need]}" for name, need in edges)
        text = f"entries need each other in a circle: {circle(cycle)} ({places}); expected one of them to need less"
        problems.add(needs[edges[0][0]][edges[0][1]], text)
