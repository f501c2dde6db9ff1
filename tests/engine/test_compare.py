"""`pipeline compare`: results of one kind side by side, with what later stages have read of exactly them."""

from __future__ import annotations

import json
import textwrap

import pytest

from stagegraph import registry
from stagegraph.registry import Comparison
from tests.support.demo import Demo, provide

WEIGH = '''
    """Weighs a shape."""
    from __future__ import annotations
    import json
    from dataclasses import dataclass
    from stagegraph.stage import Context, In, Out, Stage, StageError, param

    class Weigh(Stage):
        """Counts the letters of a shape, and refuses light ones."""
        id = "weigh"
        measures = MEASURES

        @dataclass(frozen=True)
        class Params:
            """Parameters."""
            least: int = param("letters there must be", default=1)

        inputs = {"laid": In("shape", "laid", "what is weighed")}
        outputs = {"weight": Out("weight.json", "the weight")}

        def run(self, ctx: Context) -> None:
            count = len((ctx.input("laid") / "deep" / "text").read_text())
            (ctx.out / "weight.json").write_text(json.dumps({"letters": count, "made": NUMBER}))
            if count < ctx.params.least:
                raise StageError(f"{count} letters are too few")
'''
TABLE = '''
    """Shapes side by side."""

    def row(documents):
        """What is known of one."""
        return {"text": documents["laid/deep/text"], "letters": documents.get("weight.json", {}).get("letters")}

    def page(rows):
        """A table."""
        cells = [(label, " ".join(row["text"].split()), str(row["letters"] or "-")) for label, row in rows.items()]
        lines = [f"| {' | '.join(each)} |" for each in cells]
        return "\\n".join(["| shape | text | letters |", "| --- | --- | ---: |", *lines])

    def draw(rows, path):
        """Refuse, or write."""
        if path.suffix != ".svg":
            raise ValueError(f"{path}: use .svg")
        path.write_text(" ".join(rows))
'''
LINE = '  weigh: {needs: [shape], foreach: {shape: "${vars.shapes}"}, with: {least: 1}}\n'


@pytest.fixture
def weighed(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> Demo:
    weigh = WEIGH.replace("MEASURES", "False").replace("NUMBER", "1")
    (demo.package / "weigh.py").write_text(textwrap.dedent(weigh).lstrip())
    (demo.package / "table.py").write_text(textwrap.dedent(TABLE).lstrip())
    demo.edit("shape", "write_text(lay(", "write_text(__import__('json').dumps(lay(")
    demo.edit("shape", ".read_text()))", ".read_text())))")
    how = Comparison({"shape": ("laid/deep/text",), "weigh": ("weight.json",)}, "fakes.table")
    provide(monkeypatch, {**registry.shipped().stages, "weigh": "fakes.weigh:Weigh"}, comparisons={"shape": how})
    demo.pipeline.write_text(demo.pipeline.read_text() + LINE)
    return demo


def compare(demo: Demo, *words: str):
    return demo("compare", *words, str(demo.pipeline))


def test_every_instance_is_a_row_with_what_was_found_of_it(weighed: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed.run("--stage", "shape")
    assert compare(weighed, "shape[*]", "--json").json == {
        "shape[line]": {"text": "some words here", "letters": None},
        "shape[column]": {"text": "some\nwords\nhere", "letters": None},
    }
    weighed.run("--stage", "weigh[line]")
    found = compare(weighed, "shape[*]", "--json").json
    assert [row["letters"] for row in found.values()] == [17, None]
    monkeypatch.setenv("COLUMNS", "80")
    assert "shape[line]    some words here       17" in compare(weighed, "shape").out


def test_earlier_runs_and_other_pipelines_stand_beside(weighed: Demo) -> None:
    weighed.run("--stage", "weigh[line]")
    weighed.source.write_text("more words here and there\n")
    weighed.run("--stage", "shape[line]")
    assert compare(weighed, "shape[line]", "--json").json["shape[line]"]["letters"] is None, "it read the words before"
    weighed.run("--stage", "weigh[line]")
    found = compare(weighed, "shape[line]", "shape[line]@~2", "--json").json
    assert [row["letters"] for row in found.values()] == [27, 17]
    other = weighed.folder / "other.yaml"
    other.write_text("extends: pipeline.yaml\nname: other\nvars: {shapes: [column], text: lib}\n")
    (weighed.folder / "lib" / "b.txt").write_text("words of its own\n")
    assert weighed("run", str(other), "--stage", "weigh").code == 0
    said = weighed("compare", "shape", str(weighed.pipeline), str(other), "--json")
    assert [*said.json] == ["pipeline: shape[line]", "other: shape[column]"]
    assert "note: pipeline: shape[column] has no result yet" in said.err


def test_a_refusal_has_its_figures_as_long_as_it_is_of_this_content(weighed: Demo) -> None:
    weighed.pipeline.write_text(weighed.pipeline.read_text().replace("least: 1", "least: 100"))
    assert weighed.run("--stage", "weigh[line]").code == 1
    assert compare(weighed, "shape[line]", "--json").json["shape[line]"]["letters"] == 17
    weighed.source.write_text("other words\n")
    weighed.run("--stage", "shape")
    assert compare(weighed, "shape[line]", "--json").json["shape[line]"]["letters"] is None


def test_what_cannot_be_compared_is_said(weighed: Demo) -> None:
    said = compare(weighed, "shape")
    assert (said.code, "shape[line] has no result yet" in said.err) == (2, True)
    weighed.run()
    said = compare(weighed, "read", "shape")
    assert said.code == 2
    assert "only results of one stage can be compared, of shape; found read of read, shape[line] of shape" in said.err
    assert "beside the pipeline files" in compare(weighed).err
    assert "use .svg" in compare(weighed, "shape", "--plot", str(weighed.folder / "a.png")).err
    drawn = weighed.folder / "a.svg"
    assert "drew " in compare(weighed, "shape", "--plot", str(drawn)).out
    assert drawn.read_text() == "shape[line] shape[column]"


@pytest.mark.parametrize("measures", [True, False])
def test_a_measurement_may_come_out_otherwise(weighed: Demo, measures: bool) -> None:
    text = WEIGH.replace("MEASURES", str(measures)).replace("NUMBER", "__import__('time').time_ns()")
    (weighed.package / "weigh.py").write_text(textwrap.dedent(text).lstrip())
    weighed.run()
    again = weighed.run("--force", "--stage", "weigh[line]").json
    node = next(node for node in again["nodes"] if node["node"] == "weigh[line]")
    assert node["reason"] == "forced; the result differs"
    assert bool(node["warnings"]) is not measures
    explained = weighed("explain", "weigh[line]", str(weighed.pipeline)).out
    assert ("measured before: its key gave" in explained) is measures
    built = weighed("run", str(weighed.pipeline), "--check-reproducible", "--json")
    assert built.code == (0 if measures else 1)
    assert built.json["reproduction"]["measured"] == (2 if measures else 0)


def test_rows_are_those_of_the_documents_alone(weighed: Demo) -> None:
    weighed.run()
    (weighed.path("shape.line", "laid", "deep", "text")).write_text(json.dumps("edited by hand"))
    assert compare(weighed, "shape[line]", "--json").json["shape[line]"]["text"] == "some words here"
