"""``pipeline diff``: two results, two runs, two pipelines."""

from __future__ import annotations

from pathlib import Path

from stagegraph import Pipeline, registry
from stages.provider import PROVIDER
from tests.support.demo import Demo


def rows(demo: Demo, a: str, b: str) -> dict[tuple[str, str], tuple[str, str]]:
    (found,) = demo("diff", a, b, str(demo.pipeline), "--json").json["differences"]
    return {(row["kind"], row["what"]): (row["a"], row["b"]) for row in found["rows"]}


def test_two_results_of_a_node(demo: Demo) -> None:
    demo.run()
    demo.run("--set", "vars.glue=+")
    found = rows(demo, "join", "join@~0")
    assert found["param", "glue"] == ("-", "+")
    old, new = found["file", "joined.txt"]
    assert old.startswith("44 B ")
    assert new.startswith("44 B ")
    assert old != new
    text = demo("diff", "join@~1", "join@~0", str(demo.pipeline)).out
    assert "the outputs differ" in text
    assert "param  glue: - -> +" in text


def test_the_same_output_of_other_code(demo: Demo) -> None:
    demo.run()
    demo.edit("read", "text.upper() if", "text.swapcase() if")
    demo.run()
    found = demo("diff", "read@~1", "read", str(demo.pipeline))
    assert "the outputs are identical" in found.out
    assert "code   fakes.read" in found.out


def test_facts_sources_and_json_by_value(demo: Demo) -> None:
    demo.edit("read", 'ctx.fact("language", "en")', 'ctx.fact("language", "en"); ctx.fact("n", len(text))')
    joined = '(ctx.out / "joined.txt").write_text('
    written = '(ctx.out / "joined.json").write_text(json.dumps({"a": [{"b": ctx.params.glue}]}))'
    demo.edit("join", joined, f"import json; {written}; (")
    demo.edit("join", 'Out("joined.txt"', 'Out("joined.json"')
    demo.run()
    demo.source.write_text("many other words\n")
    demo.run("--set", "vars.glue=+")
    assert rows(demo, "join@~1", "join")["inside", "joined.json: a[0].b"] == ('"-"', '"+"')
    found = rows(demo, "read@~1", "read")
    assert found["fact", "n"] == ("16", "17")
    assert ("source", "text a.txt") in found
    read, shaped = rows(demo, "join@~1", "join"), rows(demo, "shape[line]@~1", "shape[line]")
    assert {what for kind, what in read if kind == "input"} == {"laid[column]", "laid[line]"}
    assert {what for kind, what in shaped if kind == "input"} == {"words"}
    assert all(a != b and len(a) == len(b) == 12 for (kind, _), (a, b) in read.items() if kind == "input")


def test_a_stage_says_what_differs_inside(demo: Demo, monkeypatch) -> None:
    (demo.package / "words.py").write_text(
        '"""Words."""\n'
        "def compare(a, b):\n"
        '    """Count."""\n'
        "    return [('words', *(str(len(side['words.txt'].read_text().split())) for side in (a, b)))]\n"
    )
    monkeypatch.setitem(registry.shipped().comparers, "read", "fakes.words:compare")
    demo.run()
    demo.source.write_text("two words\n")
    demo.run()
    assert rows(demo, "read@~1", "read")["inside", "words"] == ("3", "2")


def test_two_runs(demo: Demo) -> None:
    demo.run("--set", "vars.shapes=[line]")
    demo.run()
    demo.run("--set", "vars.glue=+")
    found = demo("diff", "~2", "~0", str(demo.pipeline), "--json").json
    assert found["only_b"] == ["shape[column]"]
    assert [each["b"].partition("@")[0] for each in found["differing"]] == ["join"]
    assert found["same"] == 2
    assert "1 differ, 3 are the same" in demo("diff", "@~1", "@~0", str(demo.pipeline)).out


def test_two_pipelines(demo: Demo) -> None:
    other = demo.folder / "other.yaml"
    other.write_text(demo.pipeline.read_text().replace("name: demo", "name: other").replace('glue: "-"', 'glue: "+"'))
    demo.run()
    assert demo("run", str(other)).code == 0
    text = demo("diff", str(demo.pipeline), str(other)).out
    assert "param  glue: - -> +" in text
    assert "1 differ, 3 are the same" in text


def test_counts_that_do_not_pair_are_refused(demo: Demo) -> None:
    demo.run()
    assert "shape means 2 results and read 1: name one of each" in demo("diff", "shape", "read", str(demo.pipeline)).err
    assert len(demo("diff", "shape", "shape", str(demo.pipeline), "--json").json["differences"]) == 2


def test_every_comparer_is_there() -> None:
    for reference in PROVIDER.comparers.values():
        assert callable(registry.load_object(reference))


def test_from_python(demo: Demo) -> None:
    demo.run()
    demo.run("--set", "vars.glue=+")
    with Pipeline(Path(demo.pipeline)) as pipeline:
        found = pipeline.diff("join", "join@~0")
        assert not found.same
        assert [(row.a, row.b) for row in found.rows if row.kind == "param"] == [("-", "+")]
