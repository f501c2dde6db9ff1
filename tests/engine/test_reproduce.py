"""`run --check-reproducible`: everything is built again from nothing, and what differs is named."""

from __future__ import annotations

import pytest

from tests.support.demo import Demo
from tests.support.output_schema import validate

CHECK = "--check-reproducible"


def outputs(demo: Demo) -> dict[str, bytes]:
    files = (path for path in demo.folder.joinpath("artifacts", "demo").rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def test_what_is_deterministic_is_the_same_in_a_fresh_store(demo: Demo) -> None:
    demo.run()
    before, counts = outputs(demo), demo.counts
    result = demo("run", str(demo.pipeline), CHECK)
    assert result.code == 0
    assert "built again from nothing: 4 the same, byte for byte" in result.out
    assert demo.counts == counts, "every node once more"
    assert outputs(demo) == before
    assert not list(demo.folder.joinpath("artifacts", ".stagegraph", "work").iterdir())


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("read", 'str(len(text.split()))', "str(__import__('time').time_ns())"),
        ("read", 'str(len(text.split()))', "str(ctx.out)"),
    ],
    ids=["a clock", "a path"],
)  # fmt: skip
def test_what_is_not_is_named_with_what_was_made_of_it(demo: Demo, module: str, old: str, new: str) -> None:
    demo.edit(module, old, new)
    demo.run()
    before = outputs(demo)
    result = demo("run", str(demo.pipeline), CHECK, "--json")
    assert result.code == 1
    validate(result.json, "run")
    found = result.json["reproduction"]
    assert found["same"] == 2
    assert [each["a"] for each in found["differing"]] == ["read", "join"]
    rows = [[(row["kind"], row["what"]) for row in each["rows"]] for each in found["differing"]]
    assert rows == [[("file", "count.txt")], [("input", "count"), ("file", "joined.txt")]]
    assert outputs(demo) == before
    said = demo("run", str(demo.pipeline), CHECK).out
    assert "read -> again: the outputs differ" in said
    assert "built again from nothing: 2 the same, byte for byte, 2 different" in said


def test_what_is_built_once_and_not_again_is_a_failure(demo: Demo) -> None:
    demo.edit("read", 'count("read")', 'count("read"); assert "reproduce-" not in str(ctx.out)')
    demo.run()
    result = demo("run", str(demo.pipeline), CHECK)
    assert result.code == 1
    assert "error: read: built once, and not again: AssertionError" in result.err
    assert "built again from nothing: 4 failed" in result.out


def test_a_selection_is_checked_with_all_it_needs(demo: Demo) -> None:
    assert "1 the same" in demo("run", str(demo.pipeline), "--stage", "read", CHECK).out
    result = demo("run", str(demo.pipeline), CHECK, "--dry-run")
    assert result.code == 2
    assert "--check-reproducible builds everything twice, --dry-run nothing" in result.err
