"""What a later stage attests of an output: export lays it beside, and ships nothing without it unless told to."""

from __future__ import annotations

import textwrap

import pytest

from stagegraph import registry
from tests.support.demo import Demo, provide

JUDGE = '''
    """Judges a shape."""
    from __future__ import annotations
    from dataclasses import dataclass
    from stagegraph.stage import RESERVATION, Context, In, Out, Stage, StageError, param

    class Judge(Stage):
        """Says whether a shape may be shipped."""
        id = "judge"

        @dataclass(frozen=True)
        class Params:
            """Parameters."""
            least: int = param("words there must be", default=1)
            doubt: str = param("a reservation", default="")

        inputs = {"laid": In("shape", "laid", "what is judged")}
        outputs = {
            "verdict": Out("verdict.txt", "the verdict", attests="laid"),
            "page": Out("page.txt", "for people", attests="laid"),
        }

        def run(self, ctx: Context) -> None:
            words = (ctx.input("laid") / "deep" / "text").read_text().split()
            if len(words) < ctx.params.least:
                raise StageError(f"{len(words)} words are too few")
            (ctx.out / "verdict.txt").write_text(f"{len(words)} words, read as {ctx.document['inputs']['laid'][:8]}")
            (ctx.out / "page.txt").write_text("good")
            if ctx.params.doubt:
                ctx.fact(RESERVATION, ctx.params.doubt)
            ctx.summary("good words")
'''
LINE = '  judge: {needs: [shape], foreach: {shape: "${vars.shapes}"}, with: {least: 1, doubt: ""}}\n'


@pytest.fixture
def judged(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> Demo:
    (demo.package / "judge.py").write_text(textwrap.dedent(JUDGE).lstrip())
    provide(monkeypatch, {**registry.shipped().stages, "judge": "fakes.judge:Judge"})
    demo.pipeline.write_text(demo.pipeline.read_text() + LINE)
    return demo


def export(demo: Demo, reference: str, *options: str):
    return demo("export", reference, str(demo.folder / "out"), str(demo.pipeline), "--force", *options)


def exported(demo: Demo) -> list[str]:
    out = demo.folder / "out"
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.name[0] != ".")


def with_judge(demo: Demo, old: str, new: str) -> None:
    text = demo.pipeline.read_text()
    assert old in text
    demo.pipeline.write_text(text.replace(old, new))


def test_what_is_attested_lies_beside_what_it_is_of(judged: Demo) -> None:
    assert judged.run().code == 0
    said = export(judged, "shape[line]:laid")
    assert (said.code, said.out.count("judge[line]: good words")) == (0, 1)
    assert exported(judged) == ["deep/text", "page.txt", "verdict.txt"]
    digest = judged("show", "shape[line]", str(judged.pipeline), "--json").json["shape[line]"]["outputs"]["laid"][
        "digest"
    ]
    assert (judged.folder / "out" / "verdict.txt").read_text() == f"3 words, read as {digest[:8]}"
    assert export(judged, "shape[line]").code == 0
    assert exported(judged) == ["laid/deep/text", "laid/page.txt", "laid/verdict.txt"]


@pytest.mark.parametrize("reference", ["shape[line]:laid/deep/text", "read", "join"])
def test_parts_and_what_nobody_attests_are_exported_as_ever(judged: Demo, reference: str) -> None:
    assert judged.run("--stage", "join").code == 0  # judge never ran
    assert export(judged, reference).code == 0
    assert not any("verdict" in name for name in exported(judged))


def test_what_was_not_judged_yet_is_not_shipped_unless_told_to(judged: Demo) -> None:
    assert judged.run("--stage", "shape").code == 0
    said = export(judged, "shape[line]:laid")
    assert said.code == 2
    assert said.err.count("judge[line]: it has not passed yet: `pipeline run --stage judge.line`") == 1
    assert "--unverified" in said.err
    assert not (judged.folder / "out").exists()
    assert export(judged, "shape[line]:laid", "--unverified").code == 0
    assert exported(judged) == ["deep/text"]


def test_a_verdict_counts_for_the_content_it_is_of(judged: Demo) -> None:
    assert judged.run().code == 0
    judged.source.write_text("other words there\n")
    assert judged.run("--stage", "shape").code == 0  # judge's last verdict is of the words before
    assert "it has not passed yet" in export(judged, "shape[line]:laid").err
    assert export(judged, "shape[line]@~1:laid").code == 0  # and still counts for them
    assert (judged.folder / "out" / "deep" / "text").read_text() == "some words here"


def test_what_failed_last_is_not_shipped_though_it_passed_before(judged: Demo) -> None:
    assert judged.run().code == 0
    with_judge(judged, "least: 1", "least: 9")
    assert judged.run().code == 1
    assert "judge[line]: it failed when it ran last: `pipeline log judge.line`" in export(judged, "shape[line]").err
    with_judge(judged, "least: 9", "least: 2")
    assert judged.run().code == 0
    assert export(judged, "shape[line]").code == 0


def test_a_reservation_is_said_and_goes_along_when_told_to(judged: Demo) -> None:
    with_judge(judged, 'doubt: ""', "doubt: nobody listened")
    assert judged.run().code == 0
    said = export(judged, "shape[line]:laid")
    assert (said.code, "shape[line]: judge[line]: nobody listened" in said.err) == (2, True)
    assert export(judged, "shape[line]:laid", "--unverified").code == 0
    assert exported(judged) == ["deep/text", "page.txt", "verdict.txt"]


def test_a_pipeline_that_asks_nobody_is_told_whom_to_ask(judged: Demo) -> None:
    with_judge(judged, LINE, "")
    assert judged.run().code == 0
    assert "judge: no judge of this content has passed; add one to the pipeline" in export(judged, "shape[line]").err
    judged.pipeline.write_text(judged.pipeline.read_text() + LINE)
    assert judged.run().code == 0
    with_judge(judged, LINE, "")
    assert export(judged, "shape[line]").code == 0  # the verdict is in the store, whoever asked for it


def test_a_name_that_is_taken_is_a_message(judged: Demo) -> None:
    judged.edit(
        "shape",
        '(ctx.out / "laid" / "deep").mkdir(parents=True)',
        '(ctx.out / "laid" / "deep").mkdir(parents=True); (ctx.out / "laid" / "verdict.txt").write_text("mine")',
    )
    assert judged.run().code == 0
    assert "laid/verdict.txt is in it and beside it" in export(judged, "shape[line]").err
