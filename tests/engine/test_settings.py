"""``--set``: it counts, or it is refused; no verb shows another variant's result for what was asked."""

from __future__ import annotations

import pytest

from stagegraph.api import Pipeline
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


def glue(demo: Demo, *words: str) -> str:
    """Return the parameter of the result that a reference means."""
    (record,) = ask(demo, "show", *words, "--json").json.values()
    return str(record["document"]["params"]["glue"])


def test_without_settings_a_name_means_the_file_as_it_stands(varied: Demo, caplog: pytest.LogCaptureFixture) -> None:
    varied.run()
    varied.run("--set", "vars.glue=a")
    assert glue(varied, "join") == "-"
    assert glue(varied, "join@~0") == "a"
    assert "glue is -" in ask(varied, "log", "join").out
    assert ask(varied, "lineage", "join", "--json").json["executions"][0]["params"]["glue"] == "-"
    target = varied.folder / "out"
    assert varied("export", "join", str(target), str(varied.pipeline)).code == 0
    assert "-line=" in (target / "joined.txt").read_text()
    assert "(not this result as it stands)" in ask(varied, "show", "join").out, "artifacts/ shows the last run"
    assert "(not this" not in ask(varied, "show", "join", "--set", "vars.glue=a").out
    with Pipeline(varied.pipeline) as pipeline:
        assert pipeline.artifact("join").params["glue"] == "-"
    assert not caplog.messages, "there is nothing to say"


def test_what_the_file_has_no_result_of_is_the_last_one_and_said(
    varied: Demo, caplog: pytest.LogCaptureFixture
) -> None:
    told = "note: not up to date: join (glue: b -> -); the last result is taken; `pipeline explain join` says more"
    assert (glue(varied, "join"), caplog.messages) == ("b", [told])
    caplog.clear()
    varied.source.unlink()
    assert glue(varied, "join") == "b"
    assert "not up to date: join (after shape[line])" in caplog.text
    varied.source.parent.rmdir()
    assert glue(varied, "join") == "b", "it cannot even be planned"
    assert "there is no file or directory" in caplog.text


def test_a_failure_with_other_settings_is_none_of_the_file(demo: Demo) -> None:
    demo.run()
    demo.edit("join", 'count("join")', 'assert ctx.params.glue != "c"')
    demo.run()
    assert demo.run("--set", "vars.glue=c").code == 1
    assert "failed" not in ask(demo, "show", "join").out
    assert "(failed;" in ask(demo, "log", "join").out, "a log is of what was executed last"
    assert demo.run("--stage", "join", "--force", "--set", "vars.glue=c").code == 1
    demo.edit("join", 'ctx.params.glue != "c"', 'ctx.params.glue != "-"')
    assert demo.run().code == 1
    assert "failed when it ran again since" in ask(demo, "show", "join").out


def test_where_it_cannot_count_it_is_refused(varied: Demo) -> None:
    (record,) = ask(varied, "show", "join@~0", "--json").json.values()
    key = record["key"]
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
