"""What is hashed and what is not; the digests of old keys must not move by accident."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from stagegraph.digest import canonical, digest_json
from stagegraph.planning.changes import changes
from stagegraph.planning.key import key_document
from stagegraph.planning.sources import SourceState
from stagegraph.spec.model import NodeSpec
from stagegraph.stage import In, Out, Source, Stage, param, source
from stagegraph.store.record import key_of
from tests.support.demo import Demo

# Every field of a node, and whether it can influence the key. A new field must be put into one of the two.
# By id, by the code that begins there (of a command by parameters made of its arguments), by value, by content.
HASHED = {"stage", "origin", "params", "needs"}
NOT_HASHED = {"name", "entry", "each", "places", "place", "need_places", "resources", "timeout"}
STAGE_HASHED = {"id", "version", "inputs"}
STAGE_NOT_HASHED = {
    "profile",
    "Params",
    "outputs",
    "parts",
    "measures",
}  # Params by value; outputs and run by the code digest


class Example(Stage):
    """An example."""

    id = "example"
    version = 3

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Parameters."""

        checkpoint: Source = source("files", include=("*.bin",))
        scheme: str = param("scheme", default="q4")
        note: str = param("note", default="", hashed=False)

    inputs = {"config": In("other", "config", "one"), "parts": In("other", "part", "many", many=True)}
    outputs = {"out": Out("out.txt", "a file")}


def document(params: Example.Params, *, root: str = "/a", parts: tuple[str, ...] = ("p1", "p2")) -> dict:
    state = SourceState(Path(root), {}, {"w.bin": "d1"}, {})
    instances = [({"f": str(i)}, digest) for i, digest in enumerate(parts)]
    inputs = {"config": [({"t": "llvm"}, "c1")], "parts": instances}
    return key_document(Example(), params, {"checkpoint": state}, inputs, {"stages.x": "s1"}, {"tool": "1.0"}, {})


BASE = Example.Params(checkpoint=Source("/a"))


def test_every_field_is_classified() -> None:
    assert set(NodeSpec._fields) == HASHED | NOT_HASHED
    assert set(Stage.__annotations__) == STAGE_HASHED | STAGE_NOT_HASHED


def test_the_document_holds_exactly_what_it_says() -> None:
    assert document(BASE) == {
        "schema": 1,
        "stage": "example",
        "version": 3,
        "params": {"scheme": "q4"},
        "sources": {"checkpoint": {"w.bin": "d1"}},
        "inputs": {"config": "c1", "parts": [[{"f": "0"}, "p1"], [{"f": "1"}, "p2"]]},
        "code": {"stages.x": "s1"},
        "tools": {"tool": "1.0"},
    }


def test_paths_and_unhashed_parameters_do_not_count() -> None:
    moved = Example.Params(checkpoint=Source("/elsewhere"), note="a remark")
    assert key_of(document(moved, root="/elsewhere")) == key_of(document(BASE))


def test_the_digest_of_a_document_is_pinned() -> None:
    assert canonical({"b": 1, "a": ["é"]}) == '{"a":["é"],"b":1}'.encode()
    assert digest_json({}) == "6e46dd10defc9b56c29a6ec56b508c21f54c08192194e4df25bf36f0c9c3c279"
    assert key_of(document(BASE)) == PINNED


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "other"},
        {"version": 4},
        {"params": {"scheme": "q0"}},
        {"sources": {"checkpoint": {"w.bin": "d2"}}},
        {"inputs": {"config": "c2", "parts": []}},
        {"code": {"stages.x": "s2"}},
        {"tools": {"tool": "1.1"}},
        {"libraries": {"numpy": "2.0 b1"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_document_moves_the_key(change: dict) -> None:
    assert key_of({**document(BASE), **change}) != key_of(document(BASE))


def test_names_places_limits_and_instances_do_not_move_the_key(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    text = demo.pipeline.read_text()
    text = text.replace(
        "  read:", "\n\n  reader: {uses: read, timeout: 1h, resources: {memory: 1 GiB, exclusive: true}, with:"
    )
    text = text.replace('with: {with: {text: "${vars.text}"}}', 'with: {text: "${vars.text}"}}')
    text = text.replace("[read]", "[reader]").replace("[shape, read]", "[shape, reader]")
    demo.pipeline.write_text(text)
    assert set(demo.run().outcomes.values()) == {"HIT"}
    assert demo.counts == []


def test_differences_name_the_cause() -> None:
    other = document(Example.Params(checkpoint=Source("/a"), scheme="q0"), parts=("p1", "px"))
    other["code"] = {"stages.x": "s2"}
    other["tools"] = {"tool": "2.0"}
    other["libraries"] = {"numpy": "2.0 b1"}
    other["sources"] = {"checkpoint": {"w.bin": "d2"}}
    assert [change.text for change in changes(document(BASE), other)] == [
        "scheme: q4 -> q0",
        "checkpoint w.bin changed",
        "input parts changed",
        "code stages.x changed",
        "tool 1.0 -> 2.0",
        "numpy none -> 2.0 b1",
    ]


PINNED = "93348bf46fad5baf8f0c92a5b8b3e7d1402fc26c379db691df5779a0d750bb57"
