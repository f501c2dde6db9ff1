"""What packages bring: the page on it, done as it says, and providers that cannot be used."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from stagegraph import registry
from stagegraph.cli import main as cli
from stagegraph.errors import PipelineError
from tests.support.demo import Demo, provide

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


class Packages:
    """A directory on the path where packages may be installed, by what importlib.metadata reads of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, entry_point: str, files: dict[str, str]) -> None:
        about = self.folder / f"{name}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {entry_point}\n")
        for path, text in files.items():
            (self.folder / path).parent.mkdir(exist_ok=True)
            (self.folder / path).write_text(text)
        registry.installed.cache_clear()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield Packages(folder)
    for cached in (registry.installed, registry.stage_reference, registry.get_stage):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in {"lines", "one", "two"}]:
        del sys.modules[name]


def blocks(section: str) -> dict[str, str]:
    """The files of a section of the page: name -> text; the pipeline's is the one in YAML."""
    (text,) = [part for part in PAGE.read_text().split("\n## ") if part.startswith(f"{section}\n")]
    found = dict(re.findall(r"^`([\w/.]+)`[^\n]*\n\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    (found["pipeline.yaml"],) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return found


def command(*argv: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([*argv])
    return int(end.value.code or 0)


def test_a_package_brings_a_stage_and_a_verb_as_the_page_says(tmp_path, packages, monkeypatch, capsys) -> None:
    files = blocks("An installed package")
    (entry_point,) = re.findall(r'^lines = "([\w.:]+)"', files["pyproject.toml"], re.MULTILINE)
    assert f'entry-points."{registry.GROUP}"' in files["pyproject.toml"]
    packages.install("lines", entry_point, {name: files[name] for name in files if name.startswith("lines/")})
    monkeypatch.chdir(tmp_path)
    Path("pipeline.yaml").write_text(files["pipeline.yaml"])
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("one\n\nthree\n")
    assert command("run", "pipeline.yaml") == 0
    assert "3 lines" in capsys.readouterr().err
    assert command("run", "pipeline.yaml") == 0
    assert "1 HIT" in capsys.readouterr().out
    assert command("how-many", "count-lines") == 0
    assert capsys.readouterr().out == "3\n"
    stage = packages.folder / "lines" / "stage.py"
    stage.write_text(stage.read_text().replace("bool(line.strip())", "len(line) > 0"))
    assert command("status", "pipeline.yaml", "--check") == 4
    assert command("--help") == 0
    assert "say how many lines a file of counts tells of" in capsys.readouterr().out


def test_a_command_works_as_the_page_says(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in blocks("A command").items():
        Path(name).write_text(text)
    Path("text.txt").write_text("the quick brown fox jumps\n")
    assert command("run") == 0
    assert Path("artifacts/shell/words/words.txt").read_text() == "brown\njumps\nquick\n"
    assert Path("artifacts/shell/longest/longest.txt").read_text() == "brown"
    assert command("status", "--set", "vars.least=5", "--check") == 4
    Path("longest.py").write_text(Path("longest.py").read_text().replace("max", "min"))
    capsys.readouterr()
    assert command("status", "--check") == 4
    assert "in_script longest.py changed" in capsys.readouterr().out


def test_a_stage_in_a_file_works_as_the_page_says(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    files = blocks("A stage in a file beside pipeline.yaml")
    for name, text in files.items():
        Path(name).write_text(text)
    Path("text.txt").write_text("one\n  three  \nfour\n")
    assert command("run") == 0
    assert "5 letters" in capsys.readouterr().err
    assert Path("artifacts/lines/longest/line.txt").read_text() == "  three  "
    Path("measure.py").write_text(files["measure.py"].replace("line.strip()", "line"))
    assert command("status", "--check") == 4
    assert "code local.measure changed" in capsys.readouterr().out


def test_what_prepares_a_worker_is_in_the_key(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    (demo.package / "ready.py").write_text('"""Prepares."""\n\ndef one():\n    pass\n\ndef two():\n    pass\n')
    demo.edit("read", 'id = "read"', 'id = "read"\n    profile = "made-ready"')
    stages = registry.shipped().stages
    statuses = []
    for function in ("one", "one", "two"):
        provide(monkeypatch, stages, profiles={"made-ready": f"fakes.ready:{function}"})
        statuses.append(demo.run("--stage", "read").outcomes["read"])
    assert statuses == ["BUILT", "HIT", "UNCHANGED"]
    provide(monkeypatch, stages)
    assert "stage 'read': no profile 'made-ready'; known: light" in demo("status", str(demo.pipeline)).err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("PROVIDER = {}", "the provider 'one' (one.it:PROVIDER) is no stagegraph.registry.Provider"),
        ("", "the provider 'one' (one.it:PROVIDER) cannot be loaded: module 'one.it' has no attribute 'PROVIDER'"),
        ("PROVIDER = (", "the provider 'one' (one.it:PROVIDER) cannot be loaded: '(' was never closed (it.py, line 1)"),
        ("import nowhere", "the provider 'one' (one.it:PROVIDER) cannot be loaded: No module named 'nowhere'"),
    ],
)
def test_what_is_no_provider_is_named(packages, text: str, says: str) -> None:
    packages.install("one", "one.it:PROVIDER", {"one/it.py": text})
    with pytest.raises(PipelineError, match=re.escape(says)):
        registry.find("stages", "count")


def test_a_name_that_two_bring_is_an_error_and_ours_comes_first(packages) -> None:
    text = "from stagegraph.registry import Provider\nPROVIDER = Provider(stages={'count': 'x:Y', 'verify': 'x:Y'})\n"
    packages.install("one", "one.it:PROVIDER", {"one/it.py": text})
    assert registry.find("stages", "count") == "x:Y"
    packages.install("two", "two.it:PROVIDER", {"two/it.py": text})
    assert registry.find("stages", "verify") == "stages.verify:Verify"
    with pytest.raises(PipelineError, match="'count' is among the stages of more than one provider: one, two"):
        registry.find("stages", "count")
