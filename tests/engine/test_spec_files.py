"""Files: overlays with ``extends``, top-level keys, paths as the user gave them, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagegraph.errors import SpecError
from stagegraph.spec.load import load
from tests.support.spec_files import SpecFiles

BASE = """version: 1
name: base
vars: {checkpoint: data, size: 4}
stages:
  fetch: {with: {checkpoint: "${vars.checkpoint}", files: [a, b]}}
  shape: {needs: [fetch], with: {target: llvm, size: "${vars.size}"}}
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpecFiles:
    return SpecFiles(tmp_path, monkeypatch)


def problems(path: Path | str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(Path(path), (), {})
    return list(caught.value.problems)


def test_a_pipeline_and_its_nodes(spec: SpecFiles) -> None:
    pipeline = spec.load(BASE)
    assert (pipeline.name, pipeline.file, pipeline.root) == ("base", spec.root / "p.yaml", spec.root)
    fetch, shape = pipeline.nodes
    assert (fetch.name, fetch.stage.id, fetch.params.checkpoint) == ("fetch", "fetch", str(spec.root / "data"))
    assert fetch.params.files == (str(spec.root / "a"), str(spec.root / "b"))
    assert (shape.needs, shape.params.size, str(shape.place)) == (("fetch",), 4, "p.yaml:6:3")
    assert str(shape.need_places["fetch"]) == "p.yaml:6:19"
    assert {name: str(place) for name, place in shape.places.items()} == {
        "target": "p.yaml:6:42",
        "size": "p.yaml:3:32",
    }


def test_an_overlay_merges_mappings_and_replaces_the_rest(spec: SpecFiles) -> None:
    spec.write("base.yaml", BASE)
    spec.write("sub/over.yaml", """extends: ../base.yaml
name: over
vars: {size: 7, other: 1}
stages:
  fetch: {with: {files: [c]}, timeout: 1m}
  late: {uses: shape, needs: [shape], with: {target: cuda}}
""")  # fmt: skip
    pipeline = load(Path("sub/over.yaml"), (), {})
    fetch, shape, late = pipeline.nodes
    assert (pipeline.name, pipeline.root) == ("over", spec.root / "sub")
    assert fetch.params.checkpoint == str(spec.root / "data"), "written in base.yaml, so relative to that"
    assert fetch.params.files == (f"{spec.root}/sub/c",)
    assert {name: str(place) for name, place in fetch.places.items()} == {
        "checkpoint": "base.yaml:3:20",
        "files": "sub/over.yaml:5:25",
    }
    assert (fetch.timeout, str(fetch.place)) == (60.0, "base.yaml:5:3")
    assert (shape.params.size, str(shape.places["size"])) == (7, "sub/over.yaml:3:14")
    assert (late.entry, late.needs) == ("late", ("shape",))


def test_problems_of_all_layers_name_the_file_they_are_in(spec: SpecFiles) -> None:
    spec.write("base.yaml", BASE.replace("size: 4", "size: big").replace("needs: [fetch]", "needs: [fetsh]"))
    over = "extends: base.yaml\nstages: {fetch: {with: {chekpoint: x}}}\n"
    assert spec.problems(over) == [
        "base.yaml:3:32: shape.size: found the text 'big'; expected a whole number",
        "base.yaml:6:19: shape.needs: unknown entry 'fetsh'; did you mean 'fetch'?",
        "p.yaml:2:25: unknown parameter 'chekpoint' of stage 'fetch'; did you mean 'checkpoint'?",
    ]


def test_extending_in_a_circle(spec: SpecFiles) -> None:
    spec.write("a.yaml", "extends: sub/b.yaml")
    spec.write("sub/b.yaml", "extends: ../a.yaml")
    assert problems("a.yaml") == [
        "sub/b.yaml:1:10: files extend each other in a circle: a.yaml -> sub/b.yaml -> a.yaml; expected one that ends"
    ]
    assert spec.problems("extends: p.yaml") == [
        "p.yaml:1:10: files extend each other in a circle: p.yaml -> p.yaml; expected one that ends"
    ]


@pytest.mark.parametrize("value", ["[a.yaml]", "''", "1", '"a\\0b"'])
def test_extends_is_a_path(spec: SpecFiles, value: str) -> None:
    (problem, *_) = spec.problems(f"extends: {value}")
    assert problem.startswith("p.yaml:1:10: extends: found ")
    assert problem.endswith("; expected the path of another pipeline file")


def test_files_that_cannot_be_read(spec: SpecFiles) -> None:
    assert problems("nope.yaml") == ["nope.yaml: no such file; expected a pipeline file"]
    assert problems(".") == [".: is a folder; expected a pipeline file"]
    assert spec.problems("extends: nope.yaml") == ["p.yaml:1:10: nope.yaml: no such file; expected a pipeline file"]
    (spec.root / "latin.yaml").write_bytes("version: 1\nname: caf\xe9".encode("latin-1"))
    assert problems("latin.yaml") == ["latin.yaml:2:10: byte 0xE9 is not UTF-8; expected a text file"]
    with (spec.root / "weights.bin").open("wb") as file:
        file.truncate(17 << 20)
    assert problems("weights.bin") == ["weights.bin: is larger than 4 MiB; expected a pipeline file"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "is empty"), ("# nothing\n", "is empty"), ("- a", "found a list"), ("hello", "found the text 'hello'")],
)
def test_a_file_is_a_mapping(spec: SpecFiles, text: str, found: str) -> None:
    (problem,) = spec.problems(text)
    assert problem.endswith(f": {found}; expected a mapping with the keys of a pipeline: version, name, stages")


def test_paths_are_shown_as_given(spec: SpecFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec.write("sub/p.yaml", "version: 1")
    shown = {
        path: problems(path)[0].partition(":")[0] for path in ("sub/p.yaml", "./sub/p.yaml", f"{tmp_path}/sub/p.yaml")
    }
    assert set(shown.values()) == {"sub/p.yaml"}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert problems("../sub/p.yaml")[0].startswith("../sub/p.yaml:1:1: ")
    assert problems(f"{tmp_path}/sub/p.yaml")[0].startswith(f"{tmp_path}/sub/p.yaml:1:1: ")


def test_a_byte_order_mark_is_no_content(spec: SpecFiles) -> None:
    assert spec.load("\ufeff" + BASE).name == "base"


def test_top_level_keys(spec: SpecFiles) -> None:
    assert spec.problems("vars: {}") == [
        "p.yaml:1:1: missing key 'version'; expected 'version: 1'",
        "p.yaml:1:1: missing key 'name'; expected a name, under which the artifacts are stored",
        "p.yaml:1:1: missing key 'stages'; expected a mapping of entries",
    ]
    assert spec.problems("version: '1'\nname: ../up\nstage: {}\nvars: [a]\nstages: {}") == [
        "p.yaml:1:10: version: found the text '1'; expected 1, the only version of the format there is",
        (
            "p.yaml:2:7: name: found the text '../up'; expected a safe file name: letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        ),
        "p.yaml:3:1: unknown key 'stage'; did you mean 'stages'?",
        "p.yaml:4:7: vars: found a list; expected a mapping",
        "p.yaml:5:9: stages: found an empty mapping; expected a mapping of entries",
    ]


@pytest.mark.parametrize("version", ["true", "1.0", "2", "null"])
def test_version_is_the_number_one(spec: SpecFiles, version: str) -> None:
    (problem,) = spec.problems(BASE.replace("version: 1", f"version: {version}"))
    assert problem.endswith("; expected 1, the only version of the format there is")


def test_the_name_may_refer_to_variables(spec: SpecFiles) -> None:
    assert spec.load(BASE.replace("name: base", "name: tiny-${vars.size}")).name == "tiny-4"
