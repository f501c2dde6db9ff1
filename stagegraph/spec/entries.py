"""The ``stages`` of a pipeline file: each entry's keys, the stage it uses, and the entries it needs."""

from __future__ import annotations

import itertools
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stagegraph.errors import PipelineError, PlacedError, nearest
from stagegraph.registry import Origin, get_stage, names, stage_reference
from stagegraph.spec import params
from stagegraph.spec.cycles import circle, order
from stagegraph.spec.item import Item
from stagegraph.spec.model import Place
from stagegraph.spec.settings import parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stagegraph.spec.item import Problems
    from stagegraph.spec.scope import Scope
    from stagegraph.spec.settings import Setting
    from stagegraph.stage import Stage

SHARED_KEYS = ("with", "foreach", "resources", "timeout")  # that every entry may take from `defaults`
ENTRY_KEYS = ("uses", "needs", *SHARED_KEYS)
SHELL = "shell"  # the stage that an entry declares itself (stagegraph.spec.shell)
ENTRY_NAME = re.compile(r"[a-z0-9-]+")
_IN_FILE = re.compile(r"[^:]*\.py(:.*)?", re.DOTALL)


class Entry(NamedTuple):
    """An entry whose keys are checked and whose values are still as written; ``stage`` is ``None`` if unknown."""

    name: str
    place: Place
    stage: Stage | None
    origin: Origin | None
    needs: Mapping[str, Place]
    given: Mapping[str, Item]
    foreach: Item | None
    resources: Item | None
    timeout: Item | None
    settings: tuple[Setting, ...] = ()  # parameters that some of its instances get from the command line


def read_entries(
    stages: Mapping[str, Item],
    folder: Path,
    scope: Scope,
    settings: Sequence[Setting],
    problems: Problems,
    *,
    defaults: Item | None = None,
) -> list[Entry]:
    """Return the entries in the order written, noting whatever is wrong with their keys and with what they name.

    ``folder`` is that of the pipeline file, below which stages may be in files; ``settings`` are parameters from the
    command line, which take the place of what is written. ``defaults`` are keys for entries without them, and
    parameters for every stage that has them and is not given them.
    """
    reader = _Reader(stages, str(folder), scope, settings, problems, Defaults(defaults, problems))
    entries = [entry for name, item in stages.items() if (entry := reader.entry(name, item)) is not None]
    reader.defaults.check_used()
    _check_cycles(entries, problems)
    return entries


class Defaults:
    """What entries share: keys by name, and parameters for those stages that have them."""

    def __init__(self, item: Item | None, problems: Problems) -> None:
        self._problems = problems
        keys = (problems.mapping(item, "defaults", SHARED_KEYS) if item is not None else None) or {}
        given = problems.mapping(keys["with"], "defaults.with") if "with" in keys else None
        self._parameters = given or {}
        self._keys = {key: value for key, value in keys.items() if key != "with" and key in SHARED_KEYS}
        self._unused = dict(self._parameters)

    def keys(self, body: dict[str, Item]) -> dict[str, Item]:
        """Return an entry's keys with those that it lacks; one that is null is wanted not to be there."""
        whole = {**self._keys, **body}
        return {key: item for key, item in whole.items() if item.value is not None or key not in self._keys}

    def parameters(self, stage: Stage | None, given: Mapping[str, Item]) -> dict[str, Item]:
        """Return what a stage is given with the parameters that it has, and is not given."""
        known = params.declared(stage) if stage is not None else self._parameters
        shared = {name: item for name, item in self._parameters.items() if name in known}
        self._unused = {name: item for name, item in self._unused.items() if name not in shared}
        return shared | dict(given)

    def check_used(self) -> None:
        """Note parameters that no stage of the pipeline has."""
        for name, item in self._unused.items():
            self._problems.add(item.named_at, f"no stage of this pipeline has a parameter '{name}'", "defaults.with")


class _Reader:
    def __init__(
        self,
        stages: Mapping[str, Item],
        folder: str,
        scope: Scope,
        settings: Sequence[Setting],
        problems: Problems,
        defaults: Defaults,
    ) -> None:
        self._settings, self.defaults = settings, defaults
        self._stages, self._folder, self._scope, self._problems = stages, folder, scope, problems
        self._local: dict[tuple[Path, str], tuple[Stage, Origin]] = {}  # what many entries use is looked for once

    def entry(self, name: str, item: Item) -> Entry | None:
        if not ENTRY_NAME.fullmatch(name):
            text = f"'{name}' cannot name an entry; expected lower-case letters, digits and hyphens"
            self._problems.add(item.named_at, text)
        if item.value is None:
            self._problems.unexpected(item, f"a mapping with keys of {', '.join(ENTRY_KEYS)}, or {{}}", name)
            return None
        body = self._problems.mapping(item, name, ENTRY_KEYS, advice=partial(_as_parameter, name, item))
        if body is None:
            return None
        body = self.defaults.keys(body)
        settings = [setting for setting in self._settings if setting.entry == name]
        body = self._set(body, {s.parameter: s.item for s in settings if s.instances is None})
        some = tuple(setting for setting in settings if setting.instances is not None)
        needs = self._needs(name, body.get("needs"))
        stage, origin = self._stage(name, item, body.get("uses"))
        given: Mapping[str, Item] | None
        if origin is not None and origin.reference == SHELL:
            from stagegraph.spec.shell import read_shell  # few pipelines have one

            declared, given, reads = read_shell(name, body.get("with"), self._stages, self._scope, self._problems)
            needs = reads | needs
            origin = Origin("stagegraph.shell:make", arguments=declared)
            stage = origin.make()
        else:
            given = self._problems.mapping(body["with"], f"{name}.with") if "with" in body else {}
            given = self.defaults.parameters(stage, given) if given is not None else None
        if stage is not None and given is not None:
            place = body["with"].named_at if "with" in body else item.named_at
            self._check_params(stage, {**given, **{s.parameter: s.item for s in some}}, place)
        return Entry(
            name,
            item.named_at,
            stage,
            origin,
            needs,
            given or {},
            body.get("foreach"),
            body.get("resources"),
            body.get("timeout"),
            some,
        )

    @staticmethod
    def _set(body: dict[str, Item], items: Mapping[str, Item]) -> dict[str, Item]:
        """Return the keys of an entry with parameters set; whatever ``with`` is but a mapping stays, to be refused."""
        if not items:
            return body
        given = body.get("with") or Item({}, next(iter(items.values())).place, Path())
        return (
            {**body, "with": given._replace(value={**given.value, **items})} if isinstance(given.value, dict) else body
        )

    def _stage(self, name: str, entry: Item, uses: Item | None) -> tuple[Stage | None, Origin | None]:
        """Return the stage that an entry uses, by default that of its own name; one of ``shell`` is not made yet."""
        named = entry._replace(value=name, place=entry.named_at) if uses is None else self._scope.resolve(uses)
        if named is None or not isinstance(named.value, str):
            if named is not None:
                self._problems.unexpected(named, "the name of a stage", f"{name}.uses")
            return None, None
        place, name = named.place, named.value
        if name == SHELL:
            return None, Origin(SHELL)
        try:
            if uses is not None and _IN_FILE.fullmatch(name):
                return self._beside(named.base, name)
            return get_stage(name), Origin(stage_reference(name))
        except KeyError:
            advice = nearest(name, [*names("stages"), SHELL])
            if uses is None and name in ENTRY_KEYS:
                advice = "; it is a key of an entry: indent it further than the entry's name"
            elif uses is None and "did you mean" not in advice:
                advice += "; an entry of another name says which it is with `uses`"
            self._problems.add(place, f"unknown stage '{name}'{advice}")
        except Exception as error:  # noqa: BLE001 - a stage's module is the user's to edit; anything may be in it
            if isinstance(error, PlacedError):
                self._problems.add(Place(*error.place) if error.place else place, str(error))
                return None, None
            kind = "" if isinstance(error, PipelineError | ImportError) else f"{type(error).__name__}: "
            self._problems.add(place, f"stage '{name}' cannot be loaded: {kind}{error}")
        return None, None

    def _beside(self, base: Path, text: str) -> tuple[Stage, Origin]:
        """Return a stage in a file beside the pipeline."""
        from stagegraph import local  # few pipelines have one

        if not self._local:
            local.forget(self._folder)  # so that the files are known as they are now
        if (base, text) not in self._local:
            reference, made = local.find_stage(self._folder, base, text)
            stage = made()
            params.declared(stage)  # what it declares wrongly is said now
            self._local[base, text] = stage, Origin(reference, self._folder)
        return self._local[base, text]

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
            example = f", as [{resolved.value}]" if isinstance(resolved.value, str) else ""
            self._problems.unexpected(resolved, f"a list of entries{example}", subject)
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


def _as_parameter(entry: str, item: Item, key: str) -> str:
    """Say of an unknown key of an entry that it is a parameter, if it is one."""
    if key not in parameters(entry, item):
        return ""
    return f"; it is a parameter: write it under 'with', as with: {{{key}: ...}}"


def _check_cycles(entries: list[Entry], problems: Problems) -> None:
    needs = {entry.name: entry.needs for entry in entries}
    known = {name: [need for need in needed if need in needs] for name, needed in needs.items()}
    for cycle in order(known)[1]:
        edges = list(itertools.pairwise([*cycle, cycle[0]]))
        places = ", ".join(f"{name} needs {need}: {needs[name][need]}" for name, need in edges)
        text = f"entries need each other in a circle: {circle(cycle)} ({places}); expected one of them to need less"
        problems.add(needs[edges[0][0]][edges[0][1]], text)
