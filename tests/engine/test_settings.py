"""``--set``: it counts, or it is refused; no verb shows another variant's result for what was asked."""

from __future__ import annotations

import pytest

from tests.support.demo import Demo


@pytest.fixture
def varied(demo: Demo) -> Demo:
    demo.edit("join", 'count("join")', 'count("join"); print(f"glue is {ctx.params.glue}")')
    for value in ("a", "b"):
        assert demo.run("--set", f"vars.glue={value}").code == 0
    return demo


def ask(demo: Demo, *words: str):
    verb, *rest = words
    return demo(verb, *rest[:1], str(demo.pipeline), *rest[1:])


@pytest.mark.parametrize(("value", "said"), [("a", "glue is a"), ("b", "glue is b")])
def test_the_log_is_that_of_the_settings(varied: Demo, value: str, said: str) -> None:
    assert said in ask(varied, "log", "join", "--set", f"vars.glue={value}").out
    assert "glue is b" in ask(varied, "log", "join").out
    refused = ask(varied, "log", "join", "--set", "vars.glue=c")
    assert (refused.code, "no log with these settings" in refused.err) == (2, True)


def test_a_result_is_that_of_the_settings(varied: Demo) -> None:
    for value in ("a", "b"):
        found = ask(varied, "show", "join", "--json", "--set", f"vars.glue={value}").json
        assert found["join"]["document"]["params"]["glue"] == value
        lineage = ask(varied, "lineage", "join", "--json", "--set", f"vars.glue={value}").json
        assert lineage["executions"][0]["params"]["glue"] == value
    target = varied.folder / "out"
    assert varied("export", "join", str(target), str(varied.pipeline), "--set", "vars.glue=a").code == 0
    assert "a" in (target / "joined.txt").read_text().replace("line", "")
    refused = ask(varied, "show", "join", "--set", "vars.glue=c")
    assert (refused.code, "no result with these settings" in refused.err) == (2, True)


def test_where_it_cannot_count_it_is_refused(varied: Demo) -> None:
    key = ask(varied, "show", "join", "--json").json["join"]["key"]
    for reference in ("join@~0", key[:12]):
        refused = ask(varied, "show", reference, "--set", "vars.glue=a")
        assert (refused.code, "whatever --set says" in refused.err) == (2, True)
    for verb in ("runs", "du", "fsck"):
        refused = varied(verb, str(varied.pipeline), "--set", "vars.glue=a")
        assert (refused.code, "unknown argument '--set'" in refused.err) == (2, True)


@pytest.mark.parametrize("setting", ["x\n" * 5000, "vars." + "x\n" * 5000 + "=1", "join." + "x" * 9000 + "=1"])
def test_a_name_as_long_as_a_file_is_told_in_a_line(demo: Demo, setting: str) -> None:
    refused = demo.run("--set", setting)
    assert (refused.code, "is too long for a name; expected NAME=VALUE" in refused.err) == (2, True)
    assert len(refused.err) < 400
