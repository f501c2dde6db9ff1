"""References, and looking at what they mean: pages, views, files, earlier runs."""

from __future__ import annotations

import pytest

from stagegraph import Pipeline
from stagegraph.cli import pager, show
from stagegraph.errors import PipelineError
from tests.support.demo import Demo


def shown(demo: Demo, *argv: str) -> str:
    result = demo("show", argv[0], str(demo.pipeline), *argv[1:])
    assert result.code == 0, result.err
    return result.out


def test_a_file_of_a_node_and_a_folder(demo: Demo) -> None:
    demo.run()
    assert shown(demo, "read:words.txt") == "some words here\n"
    assert shown(demo, "shape[line]:laid/deep/text") == "some words here\n"
    assert "laid/deep/text" in shown(demo, "shape[line]:laid")
    assert shown(demo, "read:views/page") == "a page\n"
    wrong = demo("show", "read:word.txt", str(demo.pipeline))
    assert (wrong.code, "did you mean 'words.txt'?" in wrong.err) == (2, True)


def test_views_are_listed(demo: Demo) -> None:
    demo.run()
    assert shown(demo, "read", "--views") == "read: page\n"
    assert shown(demo, "shape", "--views") == "shape[line]: no views\nshape[column]: no views\n"


def test_views_for_programs_are_not_in_the_page(demo: Demo) -> None:
    made = 'ctx.view("page", "a page\\n")'
    demo.edit("read", made, f'{made}; ctx.view("data.json", "[17]\\n")')
    demo.run()
    assert shown(demo, "read", "--views") == "read: data.json, page\n"
    page = shown(demo, "read")
    assert "-- page --\na page\n" in page
    assert "data.json" not in page
    assert shown(demo, "read", "--view", "data.json") == "[17]\n"


def test_binaries_are_described(demo: Demo) -> None:
    demo.edit(
        "join", '(ctx.out / "joined.txt").write_text(', '(ctx.out / "joined.txt").write_bytes(b"\\x7fELF\\xff"); len('
    )
    demo.run()
    assert shown(demo, "join:joined.txt") == (
        "join:joined.txt  5 B, an ELF binary (shared library or object), begins 7f 45 4c 46 ff\n"
    )


def test_an_earlier_run_and_digests(demo: Demo) -> None:
    demo.run()
    first = demo.path("join", "joined.txt").read_text()
    demo.run("--set", "vars.glue=+")
    second = demo.path("join", "joined.txt").read_text()
    assert first != second
    with Pipeline(demo.pipeline) as pipeline:
        older, newer = pipeline.runs()
        assert pipeline.artifact("join@~1:joined.txt").read_text("joined.txt") == first
        assert pipeline.artifact("join@~0").read_text("joined.txt") == second
        assert pipeline.artifact(f"join@{older.id[:8]}").key == pipeline.artifact("join@~1").key
        assert pipeline.artifact("read@~0").key == pipeline.artifact("read").key  # it did not run in that run
        assert pipeline.artifact(f"join@{newer.id[:8]}").params == {"glue": "+"}
        key = pipeline.artifact("read").key
        output = pipeline.artifact("read").record["outputs"]["words"]["digest"]
        file, _ = pipeline.artifact("read").files["words.txt"]
        assert pipeline.artifact(key[:10]).key == key
        assert pipeline.artifact(f"{key[:10]}:count.txt").read_text("count.txt") == "3"
        assert pipeline.artifact(output[:12]).files.keys() == {"words.txt"}
        assert pipeline.artifact(file[:12]).path == "words.txt"
    assert shown(demo, file[:12]) == "some words here\n"
    assert f"join@{older.id[:8]}" in shown(demo, "join@~1")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("joint", "no node is named 'joint'; did you mean 'join'?"),
        ("join@~5", "there is no run ~5: the history has 1"),
        ("join@abcdef", "no run begins with 'abcdef'; `pipeline runs` lists them"),
        ("abcdef123", "nothing in the store has a key or a digest that begins with abcdef123"),
        ("@", "'@' names nothing"),
        ("shape:laid", "means shape[line], shape[column]: name one of them"),
    ],
)
def test_references_that_mean_nothing_or_too_much(demo: Demo, reference: str, said: str) -> None:
    demo.run()
    with Pipeline(demo.pipeline) as pipeline, pytest.raises(PipelineError) as raised:
        pipeline.artifact(reference)
    assert said in str(raised.value)


def test_what_is_not_built_is_named_after_what_is(demo: Demo) -> None:
    demo.run("--stage", "shape[line]")
    result = demo("show", "shape", str(demo.pipeline))
    assert result.code == 2
    assert "shape[line]" in result.out
    assert "shape[column] has no result yet; `pipeline run --stage shape.column` makes it" in result.err


def test_on_a_terminal_code_is_highlighted_and_long_texts_are_paged(monkeypatch, capfd) -> None:
    monkeypatch.setattr(pager, "coloured", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    pager.page("def f():\n    return 1\n", "x.py")
    said = capfd.readouterr().out
    assert "\x1b[" in said
    assert "return" in said
    monkeypatch.setattr(pager, "coloured", lambda: False)
    monkeypatch.setenv("PAGER", "sed s/^/paged:/")
    pager.page("line\n" * 200)
    assert capfd.readouterr().out == "paged:line\n" * 200


def test_numbered_files_take_one_row() -> None:
    shards = {f"out/shard_{number}.bin": [f"{number:064d}", 1024] for number in range(show.NUMBERED + 1)}
    few = {f"out/page-{number}.txt": ["d" * 64, 5] for number in (1, 2)}
    rows = list(show._files("out", few | shards))
    digest = "d" * 16
    assert rows[:2] == [("out", "out/page-1.txt", "5 B", digest), ("out", "out/page-2.txt", "5 B", digest)]
    assert rows[2:] == [("out", "out/shard_*.bin", f"{len(shards)}.0 KiB", f"{len(shards)} files")]
