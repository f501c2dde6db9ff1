"""Two results of one key: the one made last is believed, the one before is kept, seen, compared and collected."""

from __future__ import annotations

import pytest

from tests.support.demo import Demo

PIPELINE = """\
version: 1
name: demo
vars: {kind: random, text: words}
stages:
  read: {with: {text: "${vars.text}"}}
  trouble: {with: {kind: "${vars.kind}"}}
"""


@pytest.fixture
def twice(demo: Demo) -> Demo:
    demo.pipeline.write_text(PIPELINE)
    demo.run()
    return demo


def show(demo: Demo, reference: str) -> str:
    found = demo("show", f"{reference}:out.txt", str(demo.pipeline))
    assert found.code == 0, found.err
    return found.out.strip()


def test_a_differing_result_of_the_same_key_leaves_the_earlier_one_to_be_seen(twice: Demo) -> None:
    first = show(twice, "trouble")
    forced = twice.run("--force")
    node = next(node for node in forced.json["nodes"] if node["node"] == "trouble")
    assert (node["outcome"], node["reason"]) == ("BUILT", "forced; the result differs")
    (warning,) = node["warnings"]
    assert warning.endswith("the stage is not deterministic; `pipeline show` names the earlier one, which is kept")
    second = show(twice, "trouble")
    assert second != first, "what was just made is believed"
    assert twice.path("trouble", "out.txt").read_text() == second
    assert set(twice.run().outcomes.values()) == {"HIT"}
    # as of each run it is what that run made
    assert (show(twice, "trouble@~1"), show(twice, "trouble@~0")) == (first, second)
    page = twice("show", "trouble", str(twice.pipeline)).out
    (line,) = [line for line in page.splitlines() if "of the same key" in line]
    digest = line.split()[-2]
    assert show(twice, digest) == first
    compared = twice("diff", digest, "trouble", str(twice.pipeline))
    assert "the outputs differ" in compared.out
    assert twice("diff", "@~1", "@~0", str(twice.pipeline), "--json").json["differing"][0]["a"].startswith("trouble@")
    assert f"not deterministic: its key gave {digest}" in twice("explain", "trouble", str(twice.pipeline)).out
    assert twice("fsck", str(twice.pipeline)).code == 0


def test_every_result_of_a_key_is_kept_and_one_that_comes_back_is_not_its_own_other(twice: Demo) -> None:
    seen = {show(twice, "trouble")}
    for _ in range(3):
        twice.run("--force", "--stage", "trouble")
        seen.add(show(twice, "trouble"))
    page = twice("show", "trouble", str(twice.pipeline)).out
    others = [line.split()[-2] for line in page.splitlines() if "of the same key" in line]
    assert {show(twice, digest) for digest in others} | {show(twice, "trouble")} == seen
    assert len(seen) == 4


def test_gc_collects_other_results_with_the_runs_that_made_them(twice: Demo) -> None:
    first = show(twice, "trouble")
    twice.run("--force", "--stage", "trouble")
    assert twice("gc", str(twice.pipeline), "--json").json["removed"] == []
    assert show(twice, "trouble@~1") == first
    swept = twice("gc", str(twice.pipeline), "--keep-runs", "1", "--json").json
    assert [(item["kind"], item["what"]) for item in swept["removed"]] == [("other", "demo/trouble, made otherwise")]
    assert "of the same key" not in twice("show", "trouble", str(twice.pipeline)).out
    gone = twice("show", "trouble@~1", str(twice.pipeline))
    assert gone.code == 2
    assert set(twice.run().outcomes.values()) == {"HIT"}
