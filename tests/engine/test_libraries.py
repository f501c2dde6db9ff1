"""Libraries of others in keys: found by what code imports, and told apart by what is installed."""

from __future__ import annotations

import ast
import base64
import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stagegraph.planning import installed
from stagegraph.planning.code import CodeDigests
from stagegraph.planning.summary import top_names
from stagegraph.store.index import Index
from tests.support.demo import Demo

STAGE = """\
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onlytypes

def run():
    from maths.fast import add
    return add, json
"""
Identify = Callable[[], dict[str, str]]


def install(site: Path, version: str = "1.0", native: bytes = b"\x7fELF one", source: str = "sha256=aa") -> Path:
    """Install a distribution ``Maths.Lib`` with a package, a native module and a library beside the package."""
    package = site / "maths"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "fast.so").write_bytes(native)
    (site / "maths.libs").mkdir(exist_ok=True)
    (site / "maths.libs" / "libblas.so.3").write_bytes(b"\x7fELF blas")
    info = site / f"Maths.Lib-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "RECORD").write_text(
        f"maths/__init__.py,{source},0\nmaths/fast.so,sha256=bb,8\nmaths.libs/libblas.so.3,sha256=cc,9\n"
        f"maths/__pycache__/__init__.cpython-311.pyc,,\n{info.name}/INSTALLER,sha256={version},4\n{info.name}/RECORD,,\n"
    )
    return package


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("")
    (tmp_path / "own" / "stage.py").write_text(STAGE)
    for folder in (tmp_path, tmp_path / "site"):
        monkeypatch.syspath_prepend(str(folder))
    install(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def identify(site: Path) -> Identify:
    def found() -> dict[str, str]:
        index = Index(site.parent / "index")
        try:
            code = CodeDigests(index)
            said = code.libraries(["own.stage"], {})
            code.save()
            return said
        finally:
            index.close()

    return found


def test_what_is_imported_in_a_function_counts_with_version_and_build(identify: Identify) -> None:
    found = identify()
    assert set(found) - {"libc"} == {"maths-lib"}
    assert found["maths-lib"].startswith("1.0 ")
    assert ("libc" in found) == sys.platform.startswith("linux")


@pytest.mark.parametrize(
    ("name", "content"),
    [("maths/fast.so", b"\x7fELF two"), ("maths.libs/libblas.so.3", b"\x7fELF other"), ("maths/fast.so", None)],
)
def test_a_native_library_changed_in_place_counts(
    site: Path, identify: Identify, name: str, content: bytes | None
) -> None:
    before = identify()
    if content is None:
        (site / name).unlink()
    else:
        (site / name).write_bytes(content)
    assert identify() != before


def test_what_the_installer_says_of_sources_counts(site: Path, identify: Identify) -> None:
    before = identify()
    install(site, source="sha256=other")
    assert identify() != before


def test_where_and_how_it_is_installed_does_not_count(
    site: Path, identify: Identify, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identify()
    (site / "maths" / "fast.so").touch()
    (site / "Maths.Lib-1.0.dist-info" / "INSTALLER").write_text("uv")
    assert identify() == before
    install(site.parent / "elsewhere")
    monkeypatch.setattr(sys, "path", [str(site.parent / "elsewhere"), *(p for p in sys.path if p != str(site))])
    assert identify() == before


def recorded(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def install_wheel(site: Path, python: str, tags: list[str], native: bytes) -> Path:
    """Install ``maths`` as a wheel for one Python; return the folder of what is said about it."""
    shutil.rmtree(site, ignore_errors=True)
    (site / "maths").mkdir(parents=True)
    (site / "maths" / f"fast.{python}.so").write_bytes(native)
    (site / "maths" / "made.py").write_text(f"python = {python!r}\n")
    info = site / "maths-1.0.dist-info"
    info.mkdir()
    made = recorded((site / "maths" / "made.py").read_bytes())
    (info / "RECORD").write_text(f"maths/fast.{python}.so,{recorded(native)},9\nmaths/made.py,{made},9\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\n" + "".join(f"Tag: {tag}\n" for tag in tags))
    return info


def test_wheels_of_one_version_for_two_pythons_are_one_where_an_index_brought_them(
    site: Path, identify: Identify
) -> None:
    def said() -> str:
        return identify()["maths"]

    def wheel(python: str, platform: str = "manylinux_2_28_x86_64", native: bytes | None = None) -> Path:
        return install_wheel(site, python, [f"{python}-{python}-{platform}"], native or python.encode())

    wheel("cp311")
    before = said()
    assert before == "1.0 manylinux_2_28_x86_64"
    wheel("cp313")
    assert said() == before
    wheel("cp313", "musllinux_1_2_x86_64")
    assert said() != before
    (wheel("cp313") / "direct_url.json").write_text("{}")
    assert said() != before, "a folder or a URL may bring anything"
    wheel("cp313", "linux_x86_64")
    assert said() != before, "built here"
    install_wheel(site, "cp313", ["cp39-abi3-manylinux_2_28_x86_64"], b"one")
    one = said()
    install_wheel(site, "cp313", ["cp39-abi3-manylinux_2_28_x86_64"], b"two")
    assert said() != one, "one wheel for all Pythons is compared by its content"
    wheel("cp313")
    assert said() == before
    (site / "maths" / "fast.cp313.so").write_bytes(b"rebuilt in place")
    assert said() != before


def test_what_is_not_there_counts_once_it_is(site: Path, identify: Identify) -> None:
    (site.parent / "own" / "stage.py").write_text("def run():\n    import missinglib\n")
    assert identify() == {"missinglib": "absent"}
    (site / "missinglib.py").write_text("x = 1\n")
    loose = identify()
    assert loose["missinglib"].startswith("unversioned ")
    (site / "missinglib.py").write_text("x = 2\n")
    assert identify() != loose


def test_nothing_is_read_twice(identify: Identify, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identify()

    def refuse(path: str) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(installed, "digest_file", refuse)
    monkeypatch.setattr(installed, "rows", refuse)
    assert identify() == before


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import a.b as c, d", {"a", "d"}),
        ("from . import a\nfrom .b import c", set()),
        ("try:\n    import a\nexcept ImportError:\n    import b", {"a", "b"}),
        ("import typing as t\nif t.TYPE_CHECKING:\n    import a\nelse:\n    import b", {"typing", "b"}),
        ("import_module('a.b')\nimportlib.util.find_spec('c')\n__import__('d')\nprint('e')", {"a", "c", "d"}),
    ],
)
def test_which_imports_are_found(source: str, found: set[str]) -> None:
    assert set(top_names(ast.parse(source))) == found


@pytest.mark.parametrize(
    "written", ['HERE / "native" / "libx.so"', 'HERE.joinpath("native", "libx.so")', '"native/libx.so"']
)
def test_a_library_that_code_loads_by_a_path_counts(site: Path, written: str) -> None:
    own = site.parent / "own"
    (own / "stage.py").write_text(f"import ctypes\nHERE = None\ndef run(): return ctypes.CDLL(str({written}))\n")
    (own / "native").mkdir()
    (own / "native" / "libx.so").write_bytes(b"\x7fELF one")

    def closure() -> dict[str, str]:
        index = Index(site.parent / "index")
        try:
            return CodeDigests(index).closure("own.stage", {})
        finally:
            index.close()

    before = closure()
    assert "own.stage/native/libx.so" in before
    (own / "native" / "libx.so").write_bytes(b"\x7fELF two")
    assert closure() != before


OWN_STAGE = """\
from dataclasses import dataclass
from stagegraph.stage import Out, Stage


class {name}(Stage):
    id = "{id}"

    @dataclass(frozen=True)
    class Params:
        word: str = "one"

    outputs = {{"out": Out("out.txt", "x")}}

    def run(self, ctx):
        import maths
        (ctx.out / "out.txt").write_text(ctx.params.word + str(getattr(maths, "ADDS", "")))
"""


@pytest.fixture
def two(demo: Demo, site: Path) -> Demo:
    """Two stages that import ``maths``, whose Python file is as its installer listed it."""
    for name in ("first", "second"):
        (demo.folder / f"{name}.py").write_text(OWN_STAGE.format(name=name.title(), id=name))
    demo.pipeline.write_text(
        "version: 1\nname: own\nvars: {word: one}\nstages:\n  first: {uses: ./first.py:First}\n"
        '  second: {uses: ./second.py:Second, with: {word: "${vars.word}"}}\n'
    )
    (site / "maths" / "__init__.py").write_text("ADDS = 1\n")
    install(site, source=recorded(b"ADDS = 1\n"))
    (site / "maths" / "__init__.py").write_text("ADDS = 1\n")
    return demo


def statuses(demo: Demo, *argv: str) -> dict[str, str]:
    nodes = demo("status", str(demo.pipeline), "--json", *argv).json["nodes"]
    return {node["node"]: node["status"] for node in nodes}


def test_a_python_file_edited_in_place_is_found_before_anything_is_executed(two: Demo, site: Path) -> None:
    assert two.run().outcomes == {"first": "BUILT", "second": "BUILT"}
    before = two.run().json["nodes"]
    source = site / "maths" / "__init__.py"
    source.write_text("ADDS =  2\n")  # Python itself takes one of the same second and size for the one before
    assert two.run().outcomes == {"first": "HIT", "second": "HIT"}, "what is not seen, as docs/guarantees.md says"
    assert statuses(two, "--set", "vars.word=two") == {"first": "STALE", "second": "STALE"}, "found where one is to run"
    assert two.run().outcomes == {"first": "BUILT", "second": "BUILT"}, "and from then on"
    source.write_text("ADDS =   3\n")
    assert two.run().outcomes == {"first": "BUILT", "second": "BUILT"}, "the next edit of that file is seen at once"
    assert (two.folder / "artifacts" / "own" / "first" / "out.txt").read_text() == "one3"
    source.write_text("ADDS = 1\n")
    again = two.run().json["nodes"]
    assert [(node["outcome"], node["key"]) for node in again] == [("HIT", node["key"]) for node in before]


def test_fsck_finds_an_edit_in_place_while_everything_is_in_place(two: Demo, site: Path) -> None:
    two.run()
    fsck = ("fsck", str(two.pipeline))
    assert two(*fsck).out.endswith("read\nall intact\n")
    (site / "maths" / "__init__.py").write_text("ADDS =  2\n")
    assert "edited in place: the next `pipeline run` makes first, second again\n" in two(*fsck).out
    assert statuses(two) == {"first": "STALE", "second": "STALE"}
    assert two.run().outcomes == {"first": "BUILT", "second": "BUILT"}


def test_no_result_is_kept_under_the_key_of_the_library_that_was_installed(two: Demo, site: Path) -> None:
    two.run()
    source = site / "maths" / "__init__.py"
    source.write_text("ADDS =  2\n")
    assert two.run("--set", "vars.word=two").outcomes == {"first": "BUILT", "second": "BUILT"}, "in the same run"
    assert (two.folder / "artifacts" / "own" / "first" / "out.txt").read_text() == "one2"
    source.unlink()
    source.write_text("ADDS = 1\n")
    assert two.run("--force", "--stage", "first").outcomes["first"] == "UNCHANGED"
    assert two.run("--set", "vars.word=two").outcomes == {"first": "HIT", "second": "BUILT"}
    assert (two.folder / "artifacts" / "own" / "second" / "out.txt").read_text() == "two1"


def test_an_edit_of_a_library_while_a_stage_runs_is_kept_by_nobody(two: Demo, site: Path) -> None:
    source = site / "maths" / "__init__.py"
    text = (two.folder / "first.py").read_text()
    edit = f"        import maths\n        open({str(source)!r}, 'a').write('#')\n"
    (two.folder / "first.py").write_text(text.replace("        import maths\n", edit))
    run = two.run("--stage", "first")
    assert run.outcomes == {"first": "FAILED"}
    assert "changed while it was being read; run again" in run.out


@pytest.mark.parametrize("name", ["__init__.py", "fast.so"])
def test_a_library_that_gets_another_name_while_a_stage_runs_is_what_it_was(two: Demo, site: Path, name: str) -> None:
    """Installers link the files of a library into every environment."""
    text = (two.folder / "first.py").read_text()
    linked, at = str(site / "maths" / name), str(site.parent / "linked")
    edit = f"        import maths, os\n        os.link({linked!r}, {at!r})\n"
    (two.folder / "first.py").write_text(text.replace("        import maths\n", edit))
    assert two.run("--stage", "first").outcomes == {"first": "BUILT"}
    assert two.run("--stage", "first").outcomes == {"first": "HIT"}


def test_what_makes_parts_is_of_libraries_too(site: Path) -> None:
    def digest() -> str:
        index = Index(site.parent / "index")
        try:
            return CodeDigests(index).part_code(["own.stage"], {}).digest
        finally:
            index.close()

    before = digest()
    (site / "maths" / "fast.so").write_bytes(b"\x7fELF two")
    assert digest() != before


def test_a_rebuilt_library_makes_a_stage_stale_and_is_named(demo: Demo, site: Path) -> None:
    (demo.folder / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom stagegraph.stage import Out, Stage\n\n\n"
        "class Mine(Stage):\n    id = 'mine'\n\n    @dataclass(frozen=True)\n    class Params:\n        pass\n\n"
        "    outputs = {'out': Out('out.txt', 'x')}\n\n    def run(self, ctx):\n"
        "        import maths\n        (ctx.out / 'out.txt').write_text(str(maths))\n"
    )
    demo.pipeline.write_text("version: 1\nname: own\nstages:\n  mine: {uses: ./mine.py:Mine}\n")
    assert demo.run().outcomes == {"mine": "BUILT"}
    assert demo.run().outcomes == {"mine": "HIT"}
    (site / "maths" / "fast.so").write_bytes(b"\x7fELF two")
    (node,) = demo("status", str(demo.pipeline), "--json").json["nodes"]
    assert node["status"] == "STALE"
    assert node["reasons"][0].startswith("maths-lib 1.0 ")
    assert demo.run().outcomes == {"mine": "UNCHANGED"}
    shown = demo("show", "mine", str(demo.pipeline)).out
    assert "maths-lib 1.0 " in shown


def test_each_shipped_stage_counts_what_computes_its_results(tmp_path: Path) -> None:
    expected = {
        "graph_build": {"apache-tvm", "apache-tvm-ffi", "numpy"},
        "compile": {"apache-tvm", "apache-tvm-ffi", "numpy"},
        "quantize": {"apache-tvm", "apache-tvm-ffi", "numpy", "ml-dtypes"},
        "tokenizer_bundle": {"tokenizers", "tiktoken", "regex"},
        "verify": {"apache-tvm", "numpy", "tokenizers", "jinja2", "torch"},
    }
    index = Index(tmp_path / "index")
    code = CodeDigests(index)
    for stage, names in expected.items():
        found = code.libraries([f"stages.{stage}"], {"stages.models:FAMILIES": "llama"})
        assert names <= found.keys(), stage
    assert (
        not {"torch", "transformers"} & code.libraries(["stages.quantize"], {"stages.models:FAMILIES": "llama"}).keys()
    )
    index.close()
