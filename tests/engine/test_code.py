"""What code a stage reaches, and which edits of it count."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from stagegraph.planning.code import CodeDigests
from stagegraph.store.index import Index
from stagegraph.store.memo import PartCode

FILES = {
    "__init__.py": "",
    "stage.py": "from lib.tools import helper\ndef run():\n    from lib import late\n    return helper, late\n",
    "tools.py": 'DATA = "words.txt"\ndef helper(): return 1\n',
    "late.py": "import lib.rows\n",
    "rows.py": 'ROWS = {"a": "lib.row_a:run", "b": ("lib.row_b:run", 2)}\nOTHER = {"x": 1}\n',
    "row_a.py": "def run(): return 'a'\n",
    "row_b.py": "def run(): return 'b'\n",
    "unused.py": "x = 1\n",
    "words.txt": "one two\n",
}


@pytest.fixture
def lib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lib"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def closure(lib: Path, rows: dict[str, str]) -> dict[str, str]:
    index = Index(lib.parent / "index")
    try:
        code = CodeDigests(index)
        found = code.closure("lib.stage", rows)
        code.save()
        return found
    finally:
        index.close()


def test_the_closure_follows_imports_rows_and_data_files(lib: Path) -> None:
    assert sorted(closure(lib, {"lib.rows:ROWS": "a"})) == [
        "lib", "lib.late", "lib.row_a", "lib.rows", "lib.rows:OTHER[x]", "lib.rows:ROWS[a]", "lib.stage", "lib.tools",
        "lib.tools/words.txt",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [*EXTENSION_SUFFIXES, ".pyc"])
def test_a_compiled_module_is_its_bytes(lib: Path, suffix: str) -> None:
    """Python takes an extension rather than source of the same name, and source rather than bytecode."""
    native = lib / f"native{suffix}"
    native.write_bytes(b"\x7fELF one\0")
    (lib / "tools.py").write_text("from lib import native\nhelper = native.helper\n")
    before = closure(lib, {})
    assert "lib.native" in before
    native.write_bytes(b"\x7fELF two\0")
    after = closure(lib, {})
    assert {name for name in before if before[name] != after[name]} == {"lib.native"}
    (lib / "native.py").write_text("helper = 1\n")
    assert (closure(lib, {})["lib.native"] == after["lib.native"]) is (suffix != ".pyc")
    (lib / "deep").mkdir()
    (lib / "deep" / f"__init__{suffix}").write_bytes(b"\x7fELF")
    (lib / "tools.py").write_text("import lib.deep\n")
    assert "lib.deep" in closure(lib, {})


def test_a_table_without_a_choice_counts_whole(lib: Path) -> None:
    assert {"lib.row_a", "lib.row_b", "lib.rows:ROWS[b]"} <= set(closure(lib, {}))


@pytest.mark.parametrize(
    ("file", "old", "new", "counts"),
    [
        ("row_a.py", "'a'", "'c'", True),
        ("row_b.py", "'b'", "'c'", False),
        ("rows.py", '"lib.row_b:run", 2', '"lib.row_b:run", 3', False),
        ("rows.py", '{"a"', '{"c": "lib.row_b:run", "a"', False),
        ("rows.py", '"lib.row_a:run"', '"lib.row_a:walk"', True),
        ("rows.py", '{"x": 1}', '{"x": 2}', True),
        ("late.py", "import lib.rows", "import lib.rows  # why", False),
        ("tools.py", "def helper(): return 1", 'def helper():\n    """Say."""\n    return 1', False),
        ("tools.py", "return 1", "return 2", True),
        ("words.txt", "two", "three", True),
        ("unused.py", "x = 1", "x = 2", False),
        ("late.py", "import lib.rows", "import lib.rows, lib.unused", True),
    ],
)
def test_which_edits_count(lib: Path, file: str, old: str, new: str, counts: bool) -> None:
    before = closure(lib, {"lib.rows:ROWS": "a"})
    text = (lib / file).read_text()
    assert old in text
    (lib / file).write_text(text.replace(old, new))
    assert (closure(lib, {"lib.rows:ROWS": "a"}) != before) is counts


def test_unchanged_files_are_not_parsed_again(lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = closure(lib, {})
    monkeypatch.setattr("stagegraph.planning.summary.summarise", None)
    assert closure(lib, {}) == before


def test_a_file_that_does_not_parse_counts_by_its_bytes(lib: Path) -> None:
    before = closure(lib, {})
    (lib / "tools.py").write_text("def (:\n")
    assert closure(lib, {})["lib.tools"] != before["lib.tools"]


def test_a_data_file_may_come_and_go(lib: Path) -> None:
    before = closure(lib, {})
    (lib / "words.txt").unlink()
    without = closure(lib, {})
    assert set(before) - set(without) == {"lib.tools/words.txt"}
    (lib / "words.txt").write_text("one two\n")
    assert closure(lib, {}) == before


def test_data_files_of_one_name_are_kept_apart_and_rows_name_theirs(lib: Path) -> None:
    for name in ("a", "b"):
        (lib / name).mkdir()
        (lib / name / "__init__.py").write_text('TABLE = {"row": "words.txt"}\n')
        (lib / name / "words.txt").write_text(name)
    (lib / "late.py").write_text("import lib.a, lib.b\n")
    before = closure(lib, {})
    assert {"lib.a/words.txt", "lib.b/words.txt"} <= set(before)
    (lib / "a" / "words.txt").write_text("other")
    assert closure(lib, {}) != before


def test_a_package_without_init_is_followed(lib: Path) -> None:
    (lib / "__init__.py").unlink()
    assert "lib.tools" in closure(lib, {})


def test_what_is_named_for_its_type_counts(lib: Path) -> None:
    """Whoever names a type is handed objects of it, and calls them."""
    (lib / "late.py").write_text("if TYPE_CHECKING:\n    import lib.row_a\nelse:\n    import lib.unused\n")
    assert {"lib.unused", "lib.row_a"} <= set(closure(lib, {}))


@pytest.mark.parametrize(
    "text",
    ["lib.unused", "lib.unused:x", "lib.unused:x.y", "import sys; from lib.unused import x; x()", "-mlib.unused"],
)
def test_a_string_that_names_a_module_is_an_import(lib: Path, text: str) -> None:
    (lib / "late.py").write_text(f"def run(): return [{text!r}]\n")
    assert ("lib.unused" in closure(lib, {})) is not text.startswith("-m")
    (lib / "late.py").write_text(f"ROWS = {{'row': [{text!r}]}}\n")
    assert ("lib.unused" in closure(lib, {})) is not text.startswith("-m")


def test_a_string_that_names_no_module_of_ours_is_none(lib: Path) -> None:
    (lib / "late.py").write_text('def run(): return ["other.lib.unused", "zlib.unused", "lib.missing", "lib/unused"]\n')
    assert {name.partition("/")[0] for name in closure(lib, {})} == {"lib", "lib.late", "lib.stage", "lib.tools"}


def part_code(lib: Path, rows: dict[str, str]) -> PartCode:
    index = Index(lib.parent / "index")
    try:
        return CodeDigests(index).part_code(["lib.late"], rows)
    finally:
        index.close()


def test_what_makes_parts_is_what_their_module_reaches(lib: Path) -> None:
    rows = {"lib.rows:ROWS": "a"}
    before = part_code(lib, rows)
    assert {Path(path).name for path in before.files} == {"__init__.py", "late.py", "row_a.py", "rows.py"}
    (lib / "tools.py").write_text("def helper(): return 2\n")
    assert part_code(lib, rows).digest == before.digest
    (lib / "rows.py").write_text((lib / "rows.py").read_text().replace('"lib.row_a:run"', '"lib.row_a:walk"'))
    assert part_code(lib, rows).digest == before.digest, "a row that the stage chose is for the part's document to tell"
    (lib / "row_a.py").write_text("def run(): return 'c'\n")
    edited = part_code(lib, rows)
    assert edited.digest != before.digest
    (lib / "rows.py").write_text((lib / "rows.py").read_text().replace('{"x": 1}', '{"x": 2}'))
    assert part_code(lib, rows).digest != edited.digest, "a table that it did not choose from counts"


def test_an_edit_under_way_is_noticed_by_what_makes_parts(lib: Path) -> None:
    code = part_code(lib, {})
    assert code.is_unchanged()
    (lib / "late.py").write_text((lib / "late.py").read_text())
    assert not code.is_unchanged()
    (lib / "late.py").unlink()
    assert not code.is_unchanged()


def test_an_edit_under_way_is_noticed(lib: Path) -> None:
    index = Index(lib.parent / "index")
    code = CodeDigests(index)
    found = code.closure("lib.stage", {})
    assert code.changed(found) == []
    (lib / "tools.py").write_text("# a remark\n" + (lib / "tools.py").read_text())
    assert code.changed(found) == []
    (lib / "row_a.py").write_text("def run(): return 'c'\n")
    (lib / "words.txt").write_text("other")
    assert code.changed(found) == [str(lib / "row_a.py"), str(lib / "words.txt")]
    index.close()
