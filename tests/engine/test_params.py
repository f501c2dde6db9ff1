"""Every parameter, its value and its origin; names that are not there, with what may have been meant."""

from __future__ import annotations

import pytest

from tests.support.demo import PIPELINE, Demo


def rows(demo: Demo, *argv: str) -> dict[str, tuple[object, str]]:
    found = demo("params", str(demo.pipeline), "--json", *argv)
    assert found.code == 0, found.err
    return {row["name"]: (row["value"], row["origin"].rpartition("/")[2]) for row in found.json["parameters"]}


def test_every_parameter_is_listed_with_its_origin(demo: Demo) -> None:
    found = rows(demo)
    assert list(found) == [
        "text", "shapes", "glue", "read.text", "read.upper", "read.note", "shape.shape", "join.glue",
    ]  # fmt: skip
    assert found["glue"] == ("-", "pipeline.yaml:3:51")
    assert found["read.upper"] == (False, "default")
    assert found["shape.shape"] == (["line", "column"], "foreach shape")
    assert found["join.glue"][0] == "-"
    assert rows(demo, "--set", "glue=+")["join.glue"] == ("+", "--set glue")
    assert rows(demo, "--set", "read.upper=true")["read.upper"] == (True, "--set read.upper")
    assert list(rows(demo, "--stage", "join")) == ["join.glue"]


def test_what_differs_between_instances_is_listed_for_each(demo: Demo) -> None:
    demo.pipeline.write_text(PIPELINE.replace("join: {", "join: {foreach: {n: [1, 2]}, "))
    found = rows(demo, "--set", "join.2.glue=+")
    assert (found["join.1.glue"][0], found["join.2.glue"][0]) == ("-", "+")
    assert "join.glue" not in found


def test_the_table_reads_as_the_file_is_written(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # room for paths of any length
    said = demo("params", str(demo.pipeline)).out
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert "false" in lines["read.upper"]
    assert "shout" in lines["read.upper"]
    assert '""' in lines["read.note"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("upper=true", "unknown variable 'upper'; known: glue, shapes, text; a parameter is set as read.upper"),
        ("uper=true", "unknown variable 'uper'; did you mean read.upper?"),
        ("glu=x", "unknown variable 'glu'; did you mean 'glue'?"),
        ("zzzz=1", "unknown variable 'zzzz'; known: glue, shapes, text; `pipeline params` lists parameters"),
        ("read.uper=true", "unknown parameter 'uper' of stage 'read'; did you mean 'upper'?"),
        ("raed.upper=true", "no entry 'raed'; did you mean 'read'?"),
        ("shape.lime.shape=line", "'shape' has no such instance; it has line, column"),
        ("read.x.upper=true", "'read' has no such instance: it has no 'foreach'"),
    ],
)
def test_a_name_that_is_not_there_is_said_with_what_may_have_been_meant(demo: Demo, setting: str, said: str) -> None:
    done = demo("status", str(demo.pipeline), "--set", setting)
    assert done.code == 2
    assert done.err == f"error: --set {setting.partition('=')[0]}: {said}\n"
