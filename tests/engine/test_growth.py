"""Pipelines of many nodes: nothing recurses from node to node, and what is drawn is what networkx reduces to."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from benchmarks import scale
from stagegraph import Pipeline
from stagegraph.cli.graph import _implied, entries_of
from stagegraph.cli.main import dispatch
from stagegraph.query.explain import DEEP
from stagegraph.query.lineage import Ancestor, _nearest_first
from stagegraph.store.documents import Documents
from stagegraph.store.index import Index
from stagegraph.store.journal import HIT

LONG = DEEP + 6


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A chain of nodes, all built, whose first has another value since, which all but the last have seen."""
    scale.write(tmp_path, "chain", LONG)
    file = tmp_path / "pipeline.yaml"
    with Pipeline(file) as pipeline:
        assert pipeline.run().ok
    file.write_text(file.read_text().replace("with: {value: 0}", "with: {value: 7}"))
    with Pipeline(file) as pipeline:
        assert pipeline.run(pipeline.select(stage=[f"n{LONG - 2}"])).ok
    return file


def test_a_change_is_followed_down_a_long_chain_to_where_it_began(chain: Path) -> None:
    with Pipeline(chain) as pipeline:
        (found,) = pipeline.explain(f"n{LONG - 1}")
    (cause,) = found.causes
    depth = 0
    while cause.because:
        (cause,) = cause.because
        depth += 1
    assert (cause.kind, cause.old, cause.new) == ("param", 0, 7)
    assert depth < 3 * DEEP
    json.dumps(found.document())


def test_a_run_without_news_asks_the_database_for_all_nodes_at_once_and_opens_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale.write(tmp_path, "wide", 8)
    file = tmp_path / "pipeline.yaml"
    with Pipeline(file) as pipeline:
        assert pipeline.run().ok
        key = pipeline.key(pipeline.dag.by_name["n3"])
        assert key is not None
    asked: list[str] = []
    opened: list[str] = []
    rows, get = Index._rows, Documents.get

    def ask(index: Index, query: str, *values: str) -> list[tuple[Any, ...]]:
        asked.append(query)
        return rows(index, query, *values)

    def read(documents: Documents, name: str) -> Any:
        opened.append(name)
        return get(documents, name)

    monkeypatch.setattr(Index, "_rows", ask)
    monkeypatch.setattr(Documents, "get", read)
    with Pipeline(file) as pipeline:
        again = pipeline.run()
        assert {outcome.status for outcome in again.outcomes} == {HIT}
        assert (len(asked) < 8, opened) == (True, [])
        record = again.outcomes[3].record
        assert record is not None
        assert record["document"]["params"] == {"value": 3}  # the rest is there for who asks
        assert opened == [f"rec:{key}"]
        whole = pipeline.workspace.record(key)
        assert record == whole
        pipeline.workspace.index.set(f"rec:{key}", {**whole, "summary": "of another run"})
    with Pipeline(file) as pipeline:
        (found,) = [outcome.record for outcome in pipeline.run().outcomes if outcome.key == key]
        assert found is not None
        assert found["summary"] == "of another run"


@pytest.mark.parametrize("options", [["--format", "ascii"], ["--format", "svg", "--entries"]])
def test_a_picture_puts_the_nodes_of_entries_together_a_few_times_whatever_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    scale.write(tmp_path, "wide", 1)  # its stages
    (tmp_path / "pipeline.yaml").write_text(
        "version: 1\nname: wide\nstages:\n"
        + "".join(
            f"  n{n}: {{uses: './trivial.py:Step', foreach: {{i: [1, 2]}}, with: {{value: '${{each.i}}'}}}}\n"
            for n in range(40)
        )
    )
    calls = 0

    def counted(dag: Any) -> Any:
        nonlocal calls
        calls += 1
        return entries_of(dag)

    monkeypatch.setattr("stagegraph.cli.graph.entries_of", counted)
    monkeypatch.chdir(tmp_path)
    assert dispatch(["graph", *options]) == 0
    assert 1 <= calls < 5


def test_executions_are_walked_back_beyond_the_depth_of_calls() -> None:
    origins = [Ancestor(f"n{i}", f"key {i}", None) for i in range(5_000)]
    for before, origin in itertools.pairwise(origins):
        origin.before.append(before)
    assert list(_nearest_first([origins[-1]])) == origins[::-1]


@pytest.mark.parametrize("seed", range(30))
def test_edges_that_others_imply_are_those_that_networkx_leaves_out(seed: int) -> None:
    chance, nodes = np.random.default_rng(seed), [f"n{i}" for i in range(20)]
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :] if chance.random() < 0.2)
    depths = {name: depth for depth, layer in enumerate(nx.topological_generations(graph)) for name in layer}
    implied = {(u, name) for name in graph for u in _implied(graph, depths, name)}
    assert set(graph.edges) - implied == set(nx.transitive_reduction(graph).edges)
