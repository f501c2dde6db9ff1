"""Beginning anywhere: the pipeline file above, names from paths, and ``init`` and ``build`` of a starter."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from stagegraph import registry
from stagegraph.cli.verbs import verb_names
from stagegraph.files import path_name
from stagegraph.registry import Starter
from tests.support.demo import PIPELINE, STAGES, Demo, provide

BEGIN = '''
    """A starter of the fake stages."""

    def add_arguments(parser):
        """One choice."""
        parser.add_argument("--glue", help="between")

    def settings(args):
        """What was asked for."""
        return {"glue": args.glue} if args.glue else {}

    def named(text):
        """It is meant as it stands."""
        return text

    def examine(path):
        """Words are a folder."""
        if not path.is_dir():
            raise ValueError(f"{path}: is no folder of words")
        return len(list(path.iterdir()))

    def compose(path, examined, settings, folder):
        """The pipeline of the other tests."""
        from tests.support.demo import PIPELINE
        text = PIPELINE.replace("text: words", f"text: {path.absolute()}").replace("demo", "${vars.text}")
        return text.replace('"-"', settings.get("glue", '"-"')) + f"# {examined} files\\n"
'''


@pytest.fixture
def begun(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """The fake stages with a starter, in an empty working directory."""
    (demo.package / "begin.py").write_text(textwrap.dedent(BEGIN).lstrip())
    starter = Starter("fakes.begin", exports="join", doc="a folder of words", then=("show", "export"))
    provide(monkeypatch, {name: f"fakes.{name}:{name.title()}" for name in STAGES}, starters={"text": starter})
    demo.pipeline.unlink()
    empty = demo.folder / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return demo


def test_the_pipeline_file_is_found_in_a_folder_above(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = demo.folder / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert demo("run").code == 0
    assert demo.path("join", "joined.txt").exists()
    assert "all 4 nodes are up to date" in demo("status").out
    assert "words" in demo("show", "read:words.txt").out
    named = demo("status", "pipeline.yaml")  # what is named is not looked for elsewhere
    assert named.code == 2
    assert "pipeline.yaml: no such file" in named.err


def test_without_any_pipeline_file_the_advice_is_init(begun: Demo) -> None:
    said = begun("run")
    assert said.code == 2
    assert "no such file, nor in a folder above; `pipeline init` writes one" in said.err


def test_a_name_that_is_a_path_is_its_last_folder(demo: Demo, tmp_path: Path) -> None:
    demo.pipeline.write_text(PIPELINE.replace("name: demo", 'name: "${vars.text}"'))
    assert demo.run().json["pipeline"] == "words"
    other = tmp_path / "models--someone--Other 1.5B" / "snapshots" / "0a1b"
    other.mkdir(parents=True)
    (other / "a.txt").write_text("other")
    assert demo.run("--set", f"text={other}").json["pipeline"] == "Other-1.5B"
    assert {path.name for path in demo.path().parent.iterdir()} == {".stagegraph", "words", "Other-1.5B"}
    demo.pipeline.write_text(PIPELINE.replace("name: demo", "name: a/b"))
    assert demo.run().code == 2


@pytest.mark.parametrize(
    ("path", "name"),
    [("/m/Qwen3-0.6B", "Qwen3-0.6B"), ("/h/models--a--B/snapshots/12", "B"), ("/m/a b.gguf", "a-b.gguf"), ("/", "")],
)
def test_path_name(path: str, name: str) -> None:
    assert path_name(path) == name


def test_two_pipelines_do_not_overwrite_each_others_view(demo: Demo) -> None:
    assert demo.run().code == 0
    other = demo.folder / "other.yaml"
    other.write_text(PIPELINE.replace('"-"', '"+"'))
    before = demo.path("join", "joined.txt").read_text()
    said = demo("run", str(other))
    assert said.code == 2
    assert "other.yaml and pipeline.yaml are both named 'demo'" in said.err
    assert demo.path("join", "joined.txt").read_text() == before
    demo.pipeline.write_text(PIPELINE.replace("demo", "renamed"))
    assert demo("run", str(other)).code == 0


def test_init_writes_a_pipeline_that_runs(begun: Demo) -> None:
    (Path(".gitignore")).write_text("*.tmp")
    made = begun("init", "--text", str(begun.source.parent), "--glue", "'+'")
    assert (made.code, made.err) == (0, "")
    assert "next: pipeline run" in made.out
    assert Path(".gitignore").read_text() == "*.tmp\nartifacts/\n"
    assert Path("pipeline.schema.json").stat().st_size > 1000
    assert begun("run").code == 0
    assert "+" in Path("artifacts/words/join/joined.txt").read_text()
    again = begun("init", "--text", str(begun.source.parent))
    assert again.code == 2
    assert "pipeline.yaml exists already" in again.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["init"], "what is it made for? add --text PATH"),
        (["init", "--text", "nowhere"], "nowhere: is no folder of words"),
        (["build", "nowhere"], "nowhere: is no folder of words"),
    ],
)
def test_what_cannot_be_begun_writes_nothing(begun: Demo, argv: list[str], said: str) -> None:
    done = begun(*argv)
    assert done.code == 2
    assert said in done.err
    assert list(Path().iterdir()) == []


def test_build_begins_runs_and_exports(begun: Demo) -> None:
    words = str(begun.source.parent)
    done = begun("build", words, "-o", "out")
    assert done.code == 0, done.err
    assert Path("out/joined.txt").exists()
    assert done.out.endswith("next: pipeline show out, or pipeline export out\n")
    assert begun.counts
    assert begun("build", words, "-o", "out").code == 0
    assert begun.counts == []
    # Another folder in the pipeline that is there: other results, other names, and the file stays as it was.
    text = Path("pipeline.yaml").read_text()
    other = begun.folder / "more"
    other.mkdir()
    (other / "b.txt").write_text("more")
    assert begun("build", str(other), "--glue", "+").code == 0
    assert "+" in Path("dist/more/joined.txt").read_text()
    assert Path("pipeline.yaml").read_text() == text
    assert {path.name for path in Path("artifacts").iterdir()} == {".stagegraph", "words", "more"}


def test_the_shipped_starter_is_complete() -> None:
    for starter in registry.shipped().starters.values():
        assert starter.exports in registry.names("stages")
        assert set(starter.then) <= set(verb_names())
