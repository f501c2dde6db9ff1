"""An opened pipeline: its DAG, the workspace beside its file, and the planner that compares the two.

Everything that answers a question about a pipeline takes a :class:`Project`; :class:`stagegraph.api.Pipeline` is one
with a method for each question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from stagegraph.errors import PlanError, SpecError
from stagegraph.planning.cached_spec import read_pipeline
from stagegraph.planning.dag import Dag, Node
from stagegraph.planning.planner import Decision, Planner
from stagegraph.store.workspace import Workspace


class Selection(NamedTuple):
    """The nodes selected by name, and these with all that they need, in topological order."""

    chosen: frozenset[Node]
    nodes: tuple[Node, ...]


class Standing(NamedTuple):
    """The key of a node as the pipeline stands, empty if it is not known, and why it has no result; empty if it has."""

    key: str
    behind: str


class Project:
    """A pipeline file with the ``artifacts/`` beside it.

    ``overrides`` are variables (``scheme``) and parameters (``compile.activations``) for this object only: a mapping of
    names to values, or ``NAME=VALUE`` texts.
    """

    def __init__(self, file: str | Path = "pipeline.yaml", overrides: Mapping[str, Any] | Sequence[str] = ()) -> None:
        settings = _settings(overrides) if isinstance(overrides, Mapping) else overrides
        self.varied = bool(overrides)  # what a node's name means is then the result that these settings have
        self.workspace = Workspace(Path(file).absolute().parent / "artifacts")
        try:
            self.dag = Dag(read_pipeline(Path(file), settings, self.workspace.index))
        except BaseException:
            self.workspace.close()
            raise
        self.planner = Planner(self.dag, self.workspace)
        self._standing: dict[Node, Standing] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the store; leaving a ``with`` block does so."""
        self.workspace.close()

    @property
    def name(self) -> str:
        """The pipeline's name, under which ``artifacts/`` shows its outputs."""
        return self.dag.pipeline.name

    def check_name(self) -> None:
        """Refuse the name, under which outputs are shown, if another file beside this one has run under it."""
        known, here = self._owner(), self.dag.pipeline.file
        if known is None or known == here.name or not (other := here.with_name(known)).exists():
            return
        from stagegraph.spec.load import load

        try:
            same = load(other).name == self.name
        except SpecError:
            return
        if same:
            raise PlanError(
                f"{here.name} and {known} are both named '{self.name}', and would show their outputs in one folder, "
                f"{self.workspace.artifacts.name}/{self.name}; give one of them another name"
            )

    def keep_name(self) -> None:
        """Record which pipeline file has this name."""
        if self._owner() != self.dag.pipeline.file.name:
            self.workspace.index.set(f"file:{self.name}", self.dag.pipeline.file.name)

    def _owner(self) -> str | None:
        known = self.workspace.index.get(f"file:{self.name}")
        return known if isinstance(known, str) else None

    @property
    def nodes(self) -> list[str]:
        """The names of all nodes in topological order."""
        return [node.name for node in self.dag.nodes]

    def select(self, *, stage: Sequence[str] = (), start: Sequence[str] = (), until: Sequence[str] = ()) -> Selection:
        """Select nodes by name or pattern (``graph-build[*,decode]``; a bare name means all instances).

        ``stage`` takes the nodes themselves, ``start`` them and everything below, ``until`` keeps of all that only
        what lies at or above its nodes. Without any, everything is selected.
        """
        problems: list[str] = []

        def found(patterns: Sequence[str]) -> list[Node]:
            nodes: list[Node] = []
            for pattern in patterns:
                try:
                    nodes += self.dag.select(pattern)
                except PlanError as error:
                    problems.extend(error.problems)
            return nodes

        chosen = set(found(stage)) | self.dag.below(found(start)) if stage or start else set(self.dag.nodes)
        if until:
            chosen &= self.dag.above(found(until))
        if problems:
            raise PlanError(*dict.fromkeys(problems))
        if not chosen:
            raise PlanError("nothing is selected: no node of the one selection lies above the other (--until)")
        needed = self.dag.above(chosen)
        return Selection(frozenset(chosen), tuple(node for node in self.dag.nodes if node in needed))

    def key(self, node: Node) -> str | None:
        """Return the key of the result that a node's name refers to; None if there is none.

        That is its result as the pipeline stands, given ``overrides`` under these. Only without them, and where it has
        none yet (:meth:`behind` says why), it is the last one that it had.
        """
        standing = self.standing([node])[0]
        if self.varied or not standing.behind:
            return standing.key or None
        return self.workspace.last(self.name, node.name).get("key")

    def behind(self, node: Node) -> str:
        """Return why a node has no result as the pipeline stands; empty if it has one."""
        return self.standing([node])[0].behind

    def failed(self, node: Node) -> bool:
        """Say whether the last execution of a node failed, unless with other settings than those that it has a result
        with.
        """
        failed, standing = self.workspace.last(self.name, node.name).get("failed"), self.standing([node])[0]
        return bool(failed) and (failed == standing.key or bool(standing.behind and not self.varied))

    def standing(self, nodes: Sequence[Node]) -> list[Standing]:
        """Return how nodes stand; nodes of one call are planned together."""
        if missing := [node for node in nodes if node not in self._standing]:
            needed = self.dag.above(missing)
            try:
                decisions = self.planner.plan([each for each in self.dag.nodes if each in needed])
            except PlanError as error:
                if self.varied:
                    raise
                if len(missing) > 1:  # of some it may be known
                    return [self.standing([node])[0] for node in nodes]
                self._standing[missing[0]] = Standing("", error.problems[0])
            else:
                self._standing |= {d.node: Standing(d.key, "" if _has_result(d) else d.reason) for d in decisions}
        return [self._standing[node] for node in nodes]


def _has_result(decision: Decision) -> bool:
    return decision.previous is not None and decision.previous["key"] == decision.key


def _settings(overrides: Mapping[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in overrides.items()]
