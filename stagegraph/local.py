"""Stages in a Python file beside the pipeline file: ``uses: ./my_stage.py:Evaluate``.

The folder of the pipeline file becomes a package of its own in this process, under a name that no other folder has.
A file in it imports those beside it as a script does (``import helper``) or as a package does (``from . import
helper``); nothing else sees them, so they hide no installed package, nor a file of that name beside another pipeline.
In keys the package is called ``local``, wherever the folder is (:mod:`stagegraph.planning.code`).
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from stagegraph.digest import digest_bytes
from stagegraph.errors import PlacedError, nearest

if TYPE_CHECKING:
    from stagegraph.stage import Stage

LOCAL = "local"
_PACKAGE = re.compile(rf"{LOCAL}_[0-9a-f]{{16}}(?!\w)")


def load_class(folder: str, reference: str) -> Any:
    """Import ``"local.module:Class"`` from a pipeline's folder and return the class."""
    package = _package(folder)
    _install(package, folder)
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(package + module.removeprefix(LOCAL)), name)


def find_stage(folder: str, base: Path, text: str) -> tuple[str, type[Stage]]:
    """Return ``"local.module:Class"`` and the class for what ``uses`` says in a pipeline file in ``base``.

    Raises :class:`PlacedError` if it is no stage, or lies outside ``folder``, that of the pipeline.
    """
    written, colon, name = text.rpartition(":") if not text.endswith(".py") else (text, "", "")
    path = os.path.normpath(base / written)
    module = os.path.relpath(path, folder).removesuffix(".py")
    if module.partition(os.sep)[0] == os.pardir:
        raise PlacedError(f"{written} lies outside the pipeline's folder {folder}; move it there")
    if not os.path.isfile(path):  # noqa: PTH113 - a text all along
        raise PlacedError(f"{written}: no such file; expected a Python file in the pipeline's folder")
    if not all(map(str.isidentifier, Path(module).parts)):
        raise PlacedError(f"{written} cannot be imported; expected names of letters, digits and '_' before '.py'")
    reference = f"{LOCAL}.{module.replace(os.sep, '.')}:{name}"
    loaded = _load(folder, reference.partition(":")[0], written)
    found = vars(loaded).get(name)
    if not colon or found is None:
        what = f"has no class '{name}'" if colon else "names no class"
        raise PlacedError(f"{written} {what}; expected {written}:CLASS{nearest(name, _stages(loaded))}")
    _check_class(found, f"{written}:{name}")
    return reference, found


def forget(folder: str) -> None:
    """Forget the loaded modules of a folder, so that the next pipeline reads them afresh."""
    package = _package(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def plain(name: str) -> str:
    """Return the name of a module, or of a table in one, as it stands in keys: ``__name__`` is good for one process."""
    return _PACKAGE.sub(LOCAL, name)


def failure(error: BaseException, folder: str) -> PlacedError:
    """Return an error that says what a module of the pipeline's folder raised, and at which line."""
    from traceback import extract_tb

    if isinstance(error, SyntaxError) and error.filename:
        return PlacedError(f"{error.msg}", (_shown(error.filename), error.lineno or 1, error.offset or 1))
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(folder)]
    if not frames:
        return PlacedError(text)
    last = frames[-1]
    return PlacedError(text, (_shown(last.filename), last.lineno or 1, (last.colno or 0) + 1))


def _load(folder: str, module: str, written: str) -> ModuleType:
    package = _package(folder)
    _install(package, folder)
    try:
        return importlib.import_module(package + module.removeprefix(LOCAL))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's file; anything may be in it
        found = failure(error, folder)
        raise PlacedError(f"{written} cannot be loaded: {found}", found.place) from None


def _stages(module: ModuleType) -> list[str]:
    from stagegraph.stage import Stage

    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Stage) and value.__module__ == module.__name__
    ]


def _check_class(found: object, reference: str) -> None:
    from dataclasses import is_dataclass

    from stagegraph.stage import In, Out, Stage

    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise PlacedError(f"{reference} is no stage; expected a class derived from stagegraph.stage.Stage")
    if not isinstance(getattr(found, "id", None), str):
        raise PlacedError(f'{reference} has no id; expected id = "...", the name by which others read its outputs')
    if not is_dataclass(getattr(found, "Params", None)):
        raise PlacedError(f"{reference} has no parameters; expected a dataclass Params in it, which may be empty")
    for kind, ports in ((In, found.inputs), (Out, found.outputs)):
        if not all(isinstance(port, kind) for port in ports.values()):
            what = f"{kind.__name__.lower()}puts"
            raise PlacedError(f"{reference}: one of its {what} is no port; expected {kind.__name__}(...)")


def _package(folder: str) -> str:
    return f"{LOCAL}_{digest_bytes(os.fsencode(folder))[:16]}"


def _install(package: str, folder: str) -> None:
    if package not in sys.modules:
        module = ModuleType(package)
        module.__path__ = [folder]
        module.__spec__ = ModuleSpec(package, None, is_package=True)
        module.__spec__.submodule_search_locations = module.__path__
        sys.modules[package] = module
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """An import finder for the modules of pipelines' folders: Python files, and folders as packages."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:  # noqa: ARG002
        """Return how to load a module of such a folder; None for every other."""
        if not path or not _PACKAGE.match(fullname):
            return None
        base = Path(path[0], fullname.rpartition(".")[2])
        for file, inside in ((base.with_name(f"{base.name}.py"), None), (base / "__init__.py", [str(base)])):
            if file.is_file():
                loader = _Loader(fullname, str(file))
                return spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=inside)
        if not base.is_dir():
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(base)]
        return spec


class _Loader(SourceFileLoader):
    """A loader that compiles the current file, with imports of its siblings made relative; uses no bytecode cache."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of a module."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        code: CodeType = compile(_Siblings(Path(path).parent).visit(tree), path, "exec")
        return code


class _Siblings(ast.NodeTransformer):
    """Makes ``import helper`` say ``from . import helper`` where there is such a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _beside(self, name: str) -> bool:
        path = self._folder / name.partition(".")[0]
        return path.with_name(f"{path.name}.py").is_file() or (path / "__init__.py").is_file()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if not node.level and self._beside(node.module or ""):
            node.level = 1
        return node

    def visit_Import(self, node: ast.Import) -> ast.AST | list[ast.AST]:
        made: list[ast.AST] = []
        for alias in node.names:
            statement: ast.stmt = ast.Import([alias])
            if self._beside(alias.name):
                parent, _, name = alias.name.rpartition(".")
                if parent and not alias.asname:  # ``import a.b`` loads a.b and names a
                    loads = ast.ImportFrom(parent, [ast.alias(name, "__loaded__")], 1)
                    made.append(ast.copy_location(loads, node))
                    parent, name = "", alias.name.partition(".")[0]
                statement = ast.ImportFrom(parent or None, [ast.alias(name, alias.asname)], 1)
            made.append(ast.copy_location(statement, node))
        return [ast.fix_missing_locations(each) for each in made]


def _shown(path: str) -> str:
    here = os.getcwd() + os.sep  # noqa: PTH109 - compared as text
    return path.removeprefix(here)
