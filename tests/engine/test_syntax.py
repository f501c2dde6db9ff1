"""Code digests are the same on every version of Python that there is here."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from stagegraph.planning import syntax
from stagegraph.planning.syntax import syntax_text

ROOT = Path(__file__).parents[2]
ODD = """
def f(a, *, b=None, **c) -> None:
    '''Doc.'''
    return f"{a:>{b}.2f} and {a!r}" f"{b:.0f}" "" u"text" f""
class C(Base, metaclass=M): x: int = 1; y = (..., None, 1e300, 1j, b"z")
async def g(): return [i async for i in h() if i] + [*a, *b], {**c, 'd': lambda: (yield)}
match a:
    case {"b": [1, *rest], **more} if rest: pass
    case C(x=0) | None: pass
"""
DUMP = """
import ast, hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("syntax", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for path in sys.argv[2:]:
    print(hashlib.sha256(module.syntax_text(ast.parse(open(path, "rb").read())).encode()).hexdigest(), path)
"""


def pythons() -> list[str]:
    """Return interpreters of the versions from 3.11 on."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [str(p) for minor in range(11, 16) for p in sorted(versions.glob(f"3.{minor}.*/bin/python"))[-1:]]
    return found or [path for minor in range(11, 16) if (path := shutil.which(f"python3.{minor}"))]


def test_every_python_writes_the_same_trees(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    files = [tmp_path / "odd.py", *sorted(ROOT.glob("stagegraph/**/*.py")), *sorted(ROOT.glob("stages/*.py"))]
    command = ["-I", "-c", DUMP, syntax.__file__, *map(str, files)]
    said = {p: subprocess.run([p, *command], capture_output=True, text=True, check=False) for p in pythons()}
    works = {python: done.stdout.splitlines() for python, done in said.items() if done.returncode == 0}
    if len(works) < 2:
        pytest.skip("there is one version of Python here")
    first = next(iter(works.values()))
    for python, lines in works.items():
        assert [line for line, other in zip(lines, first, strict=True) if line != other] == [], python


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("f(None)", "f()"),
        ("x = None", "x: None"),
        ("{**a}", "{None: a}"),
        ("[1, [2]]", "[[1], 2]"),
        ("from . import a", "import a"),
        ("from . import a", "from .. import a"),
        ("'1'", "1"),
        ("f'{a}b'", "f'{a!s}b'"),
        ("1", "1.0"),
        ("True", "1"),
    ],
)
def test_other_code_is_another_text(old: str, new: str) -> None:
    assert syntax_text(ast.parse(old)) != syntax_text(ast.parse(new))


def test_places_and_spelling_do_not_count() -> None:
    assert syntax_text(ast.parse("x = u'a'  # why\n")) == syntax_text(ast.parse("\n\nx = ( 'a' )"))
