"""``pipeline explain``: every kind of difference, followed to its root, from the decision that a run follows."""

from __future__ import annotations

from typing import Any

from stagegraph.planning.definitions import changed_definitions
from tests.support.demo import Demo, Result


def explained(demo: Demo, node: str, *argv: str) -> dict[str, Any]:
    (found,) = demo("explain", node, str(demo.pipeline), "--json", *argv).json["nodes"]
    return found


def text(demo: Demo, node: str, *argv: str) -> str:
    result: Result = demo("explain", node, str(demo.pipeline), *argv)
    assert result.code == 0, result.err
    return result.out


def test_nothing_changed(demo: Demo) -> None:
    assert "join  UNKNOWN  known only after" in text(demo, "join")
    assert "read  NEVER  it has no result yet" in text(demo, "read")
    demo.run()
    assert "join  HIT  nothing it depends on changed since its result of 20" in text(demo, "join")
    demo.path("join", "joined.txt").unlink()
    assert "a run restores them" in text(demo, "join")


def test_a_parameter_with_both_values_and_its_place(demo: Demo) -> None:
    demo.run()
    demo.pipeline.write_text(demo.pipeline.read_text().replace('glue: "-"', 'glue: "+"'))
    found = explained(demo, "join")
    (cause,) = found["causes"]
    assert (cause["kind"], cause["old"], cause["new"]) == ("param", "-", "+")
    assert cause["place"] == f"{demo.pipeline}:3"
    assert f"glue: - -> + ({demo.pipeline}:3)" in text(demo, "join")
    assert "glue: - -> * (--set vars.glue)" in text(demo, "join", "--set", "vars.glue=*")


def test_code_by_file_and_function(demo: Demo) -> None:
    demo.run()
    demo.edit("line", '" ".join', '"  ".join')
    assert "fakes/line.py changed (function lay)" in text(demo, "shape[line]")
    shown = text(demo, "shape[line]", "--diff")
    assert '-    return " ".join(text.split())' in shown
    assert '+    return "  ".join(text.split())' in shown
    demo.run()
    demo.edit("read", "class Read(Stage):", "LIMIT = 5\n\nclass Read(Stage):")
    demo.edit("read", 'ctx.view("page", "a page\\n")', 'ctx.view("page", "another\\n")')
    assert "fakes/read.py changed (function Read.run; constant LIMIT (new))" in text(demo, "read")


def test_a_row_of_a_table_and_a_module_no_longer_reached(demo: Demo) -> None:
    demo.run()
    demo.edit("shapes", '"line": "fakes.line:lay"', '"line": "fakes.column:lay"')
    said = text(demo, "shape[line]")
    assert "fakes/shapes.py: SHAPES[line] changed" in said
    assert "fakes/line.py is gone" in said
    assert "fakes/column.py is new" in said
    reasons = explained(demo, "shape[line]")["reasons"]
    assert {"code fakes.line is gone", "code fakes.column is new"} <= set(reasons)


def test_sources_by_file(demo: Demo) -> None:
    demo.run()
    demo.source.write_text("other words\n")
    (demo.source.parent / "b.txt").write_text("more\n")
    found = explained(demo, "read")
    assert [cause["text"] for cause in found["causes"]] == [
        "a.txt changed (source text)",
        "b.txt is new (source text)",
    ]
    assert found["reasons"] == ["text a.txt changed", "text b.txt is new"]


def test_an_input_is_followed_to_its_root(demo: Demo) -> None:
    demo.run()
    demo.edit("line", '" ".join', '"  ".join')
    demo.run("--stage", "shape")
    (cause,) = explained(demo, "join")["causes"]
    assert cause["text"] == "input laid changed"
    (made,) = cause["because"]
    assert made["text"] == "shape[line]: output changed"
    assert [below["text"] for below in made["because"]] == ["fakes/line.py changed (function lay)"]


def test_a_root_two_nodes_above_is_told_once(demo: Demo) -> None:
    demo.run()
    demo.source.write_text("quite other words here\n")
    demo.run("--stage", "shape")
    said = text(demo, "join")
    assert said.count("a.txt changed (source text)") == 1
    assert "read: as above" in said
    assert "shape[column]: output changed" in said


def test_below_a_stale_node_the_stale_one_is_explained(demo: Demo) -> None:
    demo.run()
    demo.source.write_text("other words\n")
    found = explained(demo, "join")
    assert found["status"] == "UNKNOWN"
    assert [cause["text"] for cause in found["causes"]] == ["read is STALE"]
    assert found["causes"][0]["because"][0]["text"] == "a.txt changed (source text)"


def test_a_failure_and_a_lost_object_are_said(demo: Demo) -> None:
    demo.run()
    for file in (demo.folder / "artifacts" / ".stagegraph" / "objects").rglob("*"):
        if file.is_file() and file.read_text() == "a page\n":
            file.chmod(0o644)
            file.unlink()
    assert "stored views/page was missing" in text(demo, "read")
    demo.run()
    demo.source.write_text("FAIL\n")
    assert demo.run().code == 1
    assert "its last execution failed: pipeline log read" in text(demo, "read")
    assert " and failed when it last ran: pipeline log read because" in text(demo, "join")


def test_what_early_cutoff_saved(demo: Demo) -> None:
    demo.run()
    demo.edit("read", "text.upper() if", "text.swapcase() if")
    demo.run()
    skipped = explained(demo, "read")["cut_off"]
    assert set(skipped) == {"shape[line]", "shape[column]", "join"}
    assert all(seconds > 0 for seconds in skipped.values())
    assert "early cutoff skipped shape[line], shape[column], join: " in text(demo, "read")


def test_reasons_of_status_run_and_explain_are_the_same_decision(demo: Demo) -> None:
    demo.run()
    demo.edit("join", 'glue: str = param("between", default="-")', 'glue: str = param("between", default="/")')
    reasons = explained(demo, "join")["reasons"]
    status = {n["node"]: n["reasons"] for n in demo("status", str(demo.pipeline), "--json").json["nodes"]}
    done = {n["node"]: n["reasons"] for n in demo.run().json["nodes"]}
    assert reasons == status["join"] == done["join"] == ["code fakes.join changed"]


def test_definitions_that_changed() -> None:
    old = '''
import os
TABLE = {"a": 1}
LIMIT = 1
class A(B):
    """Doc."""
    x = 1
    def f(self): return 1
    def g(self): return 2
def h(): return 3
'''
    new = '''
import os, sys
TABLE = {"a": 2}
LIMIT = 1
class A(B):
    """Other doc."""
    x = 2
    def f(self): return 10
    class Inner: pass
def h():
    """Doc."""
    return 3
'''
    assert changed_definitions(old, new) == [
        "functions A.f, A.g (gone)",
        "classes A, A.Inner (new)",
        "the rest of the module",
    ]
    assert changed_definitions(old, old + "\n# remark\n") == []
    assert changed_definitions(old, "def (") == []
