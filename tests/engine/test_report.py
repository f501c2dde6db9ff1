"""The one page of a pipeline, and its pictures: whole, self-contained, and nothing in it that a stage could forge."""

from __future__ import annotations

import itertools
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest

from stagegraph.cli.drawing import Bar, Box, draw_graph, draw_timeline, layers, place
from stagegraph.cli.report_tables import markdown
from tests.support.demo import Demo

VOID = {"meta"}
SPACE = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Reads a page; every element that is opened must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.links += [str(found[name]) for name in ("src", "href", "onload", "onclick") if name in found]
        self.ids += [str(found["id"])] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(demo: Demo, *argv: str) -> tuple[str, Page]:
    done = demo("report", str(demo.pipeline), "-o", str(demo.folder / "r.html"), *argv)
    assert done.code == 0, done.err
    text = (demo.folder / "r.html").read_text()
    return text, Page(text)


def test_the_page_has_every_node_and_needs_nothing_else(demo: Demo) -> None:
    assert demo.run().code == 0
    text, page = report(demo)
    assert page.ids == ["read", "shape.line", "shape.column", "join"]
    assert {*page.links} == {f"#{name}" for name in page.ids}, "of the graph, to each node"
    assert "script" not in page.tags
    assert "url(" not in text
    for said in ("4 up to date", "3 words", "parameter glue", "read was here", "a page"):
        assert said in text, said
    assert "4 nodes ran" in text
    assert text.count("#c2410c") == 3  # read, one of the shapes, join: what the run waited for


def test_a_matrix_is_one_line_to_unfold(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagegraph.cli.report_page.FOLDED", 1)
    demo.run()
    assert report(demo)[1].ids == ["read", "shape", "shape.line", "shape.column", "join"]


def test_a_run_is_held_against_the_one_before(demo: Demo) -> None:
    demo.run()
    assert "Beside the run before" not in report(demo)[0]
    demo.edit("join", 'count("join")', 'count("join"); import time; time.sleep(0.3)')
    demo.run()
    beside = report(demo)[0].partition("Beside the run before")[2].partition("</table>")[0]
    assert re.findall(r"<td>([a-z\[\]]+)</td>", beside) == ["join"]


def test_a_picture_of_the_graph_shows_how_nodes_stand(demo: Demo) -> None:
    demo.run()
    demo.edit("join", 'count("join")', 'raise ValueError("no")')
    demo.run()
    for option, state in (((), "HIT"), (("--states",), "HIT")):
        shown = demo("graph", str(demo.pipeline), "--format", "svg", *option).out
        assert (state in shown) == bool(option)
        assert ("FAILED" in shown) == bool(option)


def test_before_and_after_failures_it_says_so_first(demo: Demo) -> None:
    text, page = report(demo)
    assert "1 never built, 3 unknown" in text
    assert len(page.ids) == 4
    demo.source.write_text("FAIL <script>alert(1)</script>")
    assert demo.run().code == 1
    text, page = report(demo)
    assert "script" not in page.tags
    assert '<li class="FAILED"><code>read</code> it failed when it ran last</li>' in text
    assert '<details class="node" open>' in text.partition('id="read"')[0]


def test_what_a_stage_says_stays_text(demo: Demo) -> None:
    demo.edit("read", '"a page\\n"', '"<b>x</b>\\n| a | b |\\n|---|--:|\\n| <i> | 1 |\\n"')
    demo.edit("read", 'f"{len(text.split())} words"', '"<img src=x onerror=1>"')
    assert demo.run().code == 0
    text, page = report(demo)
    assert not {"b", "i", "img"} & page.tags
    assert '<td class="right">1</td>' in text


def test_a_run_is_chosen_and_a_file_that_cannot_be_written_is_said(demo: Demo) -> None:
    demo.run()
    demo.run("--set", "glue=+")
    assert "1 nodes ran" in report(demo)[0]
    assert "4 nodes ran" in report(demo, "--run", "@~1")[0]
    done = demo("report", str(demo.pipeline), "-o", str(demo.folder / "no" / "r.html"))
    assert done.code == 2
    assert "name a file that can be written" in done.err


def test_many_nodes_are_drawn_by_entry(demo: Demo) -> None:
    values = ", ".join(str(i) for i in range(70))
    demo.pipeline.write_text(demo.pipeline.read_text().replace("join: {", f"join: {{foreach: {{n: [{values}]}}, "))
    text, page = report(demo)
    assert len(page.ids) == 74, "73 nodes, and the line that 70 of them are folded under"
    assert "70 nodes" in text


def test_layers_put_nodes_beside_their_neighbours() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph([("a", "y"), ("b", "x"), ("c", "w"), ("y", "1"), ("x", "2"), ("w", "3")])
    found = layers(graph)
    crossings = 0
    for left, right in itertools.pairwise(found):
        at = [(left.index(a), right.index(b)) for a, b in graph.edges if a in left and b in right]
        crossings += sum(p[0] < q[0] and p[1] > q[1] for p in at for q in at)
    assert crossings == 0


def test_pictures_are_svg_with_titles_and_fitting_labels() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph([("read<", "shape[line]")])
    picture = ElementTree.fromstring(draw_graph(graph, {"read<": Box("FAILED", "a note")}, "a & b"))  # noqa: S314 - ours
    assert picture.find(f"{SPACE}title").text == "a & b"  # type: ignore[union-attr]
    width, height = map(float, picture.attrib["viewBox"].split()[2:])
    for box in picture.iter(f"{SPACE}rect"):
        assert float(box.attrib["x"]) + float(box.attrib["width"]) <= width
        assert float(box.attrib["y"]) + float(box.attrib["height"]) <= height
    heads = [path for path in picture.iter(f"{SPACE}path") if path.attrib.get("fill") == "#888"]
    assert len(heads) == len(graph.edges)
    bars = [Bar("a", 0, 2, "BUILT", critical=True), Bar("b", 1, 2, "FAILED", critical=False)]
    ElementTree.fromstring(draw_timeline(bars, "x"))  # noqa: S314 - ours
    ElementTree.fromstring(draw_timeline([], "x"))  # noqa: S314 - ours


@pytest.mark.parametrize(
    ("times", "lanes"),
    [([(0, 2), (2, 1)], [0, 0]), ([(0, 2), (1, 2), (2.5, 1)], [0, 1, 0]), ([(0, 1), (0, 1), (0, 1)], [0, 1, 2])],
)
def test_nodes_that_ran_beside_others_have_lanes_of_their_own(
    times: list[tuple[float, float]], lanes: list[int]
) -> None:
    bars = [Bar(str(i), began, seconds, "BUILT", critical=False) for i, (began, seconds) in enumerate(times)]
    assert list(place(bars).values()) == lanes


def test_markdown_is_tables_headings_and_text() -> None:
    page = markdown("# A <b>\n\n| x | y |\n|---|---:|\n| 1 \\| 2 | 3 |\n\nrest & more\n")
    assert page.startswith("<h4>A &lt;b&gt;</h4>")
    assert "<td>1 | 2</td>" in page
    assert page.endswith("<p>rest &amp; more</p>")
    assert markdown("- a\n- b\n\nc\nd\n") == "<ul><li>a</li><li>b</li></ul><p>c<br>d</p>"
    assert markdown("def f(x):\n    return x\n") == "<pre>def f(x):\n    return x</pre>"
    assert markdown("name   value\n") == "<pre>name   value</pre>"


def test_a_long_table_is_cut_where_it_is_to_be_short() -> None:
    rows = "".join(f"| {i} |\n" for i in range(20))
    assert markdown(f"| n |\n|---|\n{rows}").count("<td>") == 20
    short = markdown(f"| n |\n|---|\n{rows}", most=15)
    assert short.count("<td>") == 15
    assert short.endswith("and 5 more</p>")


def test_graph_in_svg_is_a_picture(demo: Demo) -> None:
    picture = demo("graph", str(demo.pipeline), "--format", "svg").out
    assert "<title>the graph of demo</title>" in picture
    ElementTree.fromstring(picture)  # noqa: S314 - ours
    assert Path(demo.folder / "artifacts").exists() is False


def labels(picture: str) -> list[str]:
    """Return what is written in the boxes of a picture."""
    return [str(text.text) for text in ElementTree.fromstring(picture).iter(f"{SPACE}text")]  # noqa: S314 - ours


def test_of_a_large_matrix_a_picture_shows_what_is_asked_for(demo: Demo) -> None:
    file, few = str(demo.pipeline), {"read", "shape", "join"}
    assert few < {*labels(demo("graph", file, "--format", "svg", "--entries").out)}
    values = ", ".join(str(i) for i in range(70))
    demo.pipeline.write_text(demo.pipeline.read_text().replace("join: {", f"join: {{foreach: {{n: [{values}]}}, "))
    done = demo("graph", file, "--format", "svg")
    assert {*labels(done.out)} == {*few, "2 nodes", "70 nodes"}
    assert "note: 73 nodes: drawn is a box for each entry; --expand NAME" in done.err
    shown = labels(demo("graph", file, "--format", "svg", "--expand", "shape.line").out)
    assert {"shape[line]", "shape[column]", "join", "70 nodes"} < {*shown}
    assert len(labels(demo("graph", file, "--format", "svg", "--instances").out)) == 73
    states = labels(demo("graph", file, "--format", "svg", "--expand", "shape", "--states").out)
    assert "70 nodes, all unknown" in states
    demo.run("--stage", "shape.line")
    assert "2 nodes, 1 never built" in labels(demo("graph", file, "--format", "svg", "--states").out)
    assert "no node is named 'jion'" in demo("graph", file, "--expand", "jion").err


def test_graphviz_lays_out_where_it_is_installed(demo: Demo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = """graph 1 3.5 0.9
node 0 0.5 0.2 1 0.4 "" solid box black lightgrey
node 1 2.5 0.7 2 0.4 "" solid box black lightgrey
edge 0 1 4 1 0.2 1.2 0.2 1.3 0.7 1.5 0.7 solid black
stop
"""
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/asked\ncat <<'END'\n{said}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    demo.pipeline.write_text(
        "version: 1\nname: demo\nstages:\n  read: {with: {text: words}}\n"
        "  shape: {needs: [read], with: {shape: line}}\n"
    )
    picture = ElementTree.fromstring(demo("graph", str(demo.pipeline), "--format", "svg").out)  # noqa: S314 - ours
    assert "0 -> 1;" in (tmp_path / "asked").read_text()
    assert picture.attrib["viewBox"] == "0 0 272 85", "3.5 by 0.9 inches, and a margin"
    assert [box.attrib["y"] for box in picture.iter(f"{SPACE}rect")] == ["45", "9"], "dot counts from below"
    curve, head = picture.iter(f"{SPACE}path")
    assert curve.attrib["d"] == "M 82 60 C 96 60 104 24 118 24"
    assert head.attrib["d"] == "M 111 28 L 118 24 L 111 20 Z"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert len(labels(demo("graph", str(demo.pipeline), "--format", "svg").out)) == 2, "else it is laid out here"
