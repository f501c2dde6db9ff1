"""The stage behind ``uses: shell``: runs a command, on ports and files that its entry of the pipeline file declares.

The command starts in an empty folder of its own, where it writes its outputs. What it may read is named to it relative
to that folder, so that its command line, like every path it writes down, is the same wherever and whenever it runs:
inputs of other entries and *copies* of the source files it declares. It gets the environment variables that are
declared, PATH, and an empty HOME and TMPDIR. What it leaves beside its outputs is discarded.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stagegraph.files import remove_tree
from stagegraph.stage import Context, In, Out, Source, Stage, StageError, param, source

BASH = ("-euo", "pipefail", "-c")
TAIL_LINES, TAIL_BYTES = 12, 4096
DRAIN_SECONDS = 1.0  # for the last words of what a command left running
EVERYTHING = ("**",)
_REFERENCE = re.compile(r"\$\$\{|\$\{(in|out)\.([^{}]*)\}")


class Declaration(NamedTuple):
    """What an entry declares, as JSON can hold it: ``script`` says whether its command is a text for bash."""

    script: bool
    inputs: Mapping[str, list[str]]  # name -> [entry, port]
    sources: list[str]
    outputs: Mapping[str, str]  # name -> path
    env: list[str]
    tools: list[str]

    @property
    def references(self) -> list[str]:
        """What ``${...}`` of its command and variables may name besides what every entry may."""
        return [f"in.{name}" for name in (*self.inputs, *self.sources)] + [f"out.{name}" for name in self.outputs]


def make(*declared: Any) -> Stage:
    """Return the stage of one entry, given the fields of its :class:`Declaration`."""
    entry = Declaration(*declared)
    kind, refers = "str" if entry.script else "tuple[str, ...]", entry.references
    fields: list[Any] = [
        ("cmd", kind, param("a program and its arguments, or a text for bash", references=refers)),
        ("outputs", "tuple[str, ...]", param("name=path", default=tuple(sorted(map("=".join, entry.outputs.items()))))),
        ("program", "Source", source("the program that runs", include=EVERYTHING, optional=True)),
    ]
    fields += [(f"in_{name}", "Source", source(f"source {name}", include=EVERYTHING)) for name in entry.sources]
    fields += [(f"env_{name}", "str", param(f"environment variable {name}", references=refers)) for name in entry.env]
    fields += [(tool_field(name), "Source", source(name, include=EVERYTHING, optional=True)) for name in entry.tools]
    body = {
        "Params": dataclasses.make_dataclass("Params", fields, frozen=True, kw_only=True),
        "declared": entry,
        "inputs": {name: In(entry_, port, "", entry=entry_) for name, (entry_, port) in entry.inputs.items()},
        "outputs": {name: Out(path, "") for name, path in entry.outputs.items()},
    }
    made: Stage = type("Shell", (Shell,), body)()
    return made


def tool_field(name: str) -> str:
    """Return the parameter that stands for a tool."""
    return "tool_" + re.sub(r"\W", "_", name)


class Shell(Stage):
    """Runs a command."""

    id = "shell"
    declared: Declaration

    def resolve(self, params: Any) -> Any:
        """Find the programs, whose content counts."""
        given = {"cmd": "".join(params.cmd), **{f"env.{n}": getattr(params, f"env_{n}") for n in self.declared.env}}
        if odd := [name for name, text in given.items() if "\0" in text]:
            raise StageError(*(f"{name}: has a NUL character, which no program can be given" for name in odd))
        path = getattr(params, "env_PATH", os.environ.get("PATH", os.defpath))
        wanted = {tool_field(name): name for name in self.declared.tools}
        first = "bash" if self.declared.script else next(iter(params.cmd), "")
        if not first:
            raise StageError("its cmd is empty; expected a program and its arguments")
        if not _REFERENCE.match(first):
            wanted["program"] = first
        found = {field: shutil.which(name, path=path) for field, name in wanted.items() if os.sep not in name}
        found |= {
            field: name for field, name in wanted.items() if Path(name).is_absolute() and os.access(name, os.X_OK)
        }
        missing = sorted({wanted[field] for field in wanted if not found.get(field)})
        if missing:
            advice = "install it, or declare a file under 'sources' and run it as ${in.NAME}"
            raise StageError(*(f"there is no program '{name}' on PATH; {advice}" for name in missing))
        return dataclasses.replace(params, **{field: Source(program) for field, program in found.items()})

    def run(self, ctx: Context) -> None:
        """Run it, and keep what it declares to write."""
        places = {f"in.{name}": os.path.relpath(ctx.input(name), ctx.out) for name in self.inputs}
        places |= {f"in.{name}": _copied(ctx, name) for name in self.declared.sources}
        places |= {f"out.{name}": port.path for name, port in self.outputs.items()}
        params = ctx.params
        if self.declared.script:
            command = [params.program, *BASH, _filled(params.cmd, places)]
        else:
            words = [_filled(word, places) for word in params.cmd]
            command = [params.program or words[0], *words[1:]]
        for port in self.outputs.values():
            (ctx.out / port.path).parent.mkdir(parents=True, exist_ok=True)
        declared = {name: _filled(getattr(params, f"env_{name}"), places) for name in self.declared.env}
        status, tail = _run(command, ctx.out, _environment(ctx.out) | declared)
        if status:
            ending = "\n".join(["; its last lines:", *tail]) if tail else " and printed nothing"
            how = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
            raise StageError(f"the command {how}{ending}")
        self._keep_outputs(ctx.out)

    def _keep_outputs(self, out: Path) -> None:
        paths = {name: out / port.path for name, port in self.outputs.items()}
        problems = [
            f"the command wrote no output '{name}' ({self.outputs[name].path})"
            for name, path in paths.items()
            if not any(_files(path))
        ]
        problems += [
            f"the command wrote {link.relative_to(out)} as a link or special file; outputs are real files"
            for path in paths.values()
            for link in (path, *path.rglob("*"))
            if link.is_symlink() or (link.exists() and not (link.is_file() or link.is_dir()))
        ]
        if problems:
            raise StageError(*dict.fromkeys(problems))
        _discard(out, set(paths.values()))
        for path in paths.values():
            for file in _files(path):
                _part_from_others(file)


def _program(name: str, path: str) -> str:
    """Return where a program is; empty for one that is not there, or named by a relative path."""
    relative = os.sep in name and not Path(name).is_absolute()
    return "" if relative else shutil.which(name, path=path) or ""


def _filled(text: str, places: Mapping[str, str]) -> str:
    return _REFERENCE.sub(lambda found: places[f"{found[1]}.{found[2]}"] if found[1] else "${", text)


def _copied(ctx: Context, name: str) -> str:
    """Copy the files of a source beside the folder of the command; return what names the file or folder there."""
    found = ctx.source(f"in_{name}")
    base = ctx.out.parent / "sources" / name
    for file, path in found.files.items():
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, base / file)
    given = Path(getattr(ctx.params, f"in_{name}"))
    return os.path.relpath(base / given.name if given.is_file() else base, ctx.out)


def _environment(out: Path) -> dict[str, str]:
    """Return what a command gets undeclared."""
    made = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}
    for name in ("HOME", "TMPDIR"):
        folder = out.parent / name.lower()
        folder.mkdir(exist_ok=True)
        made[name] = str(folder)
    return made


def _run(command: list[str], folder: Path, environment: Mapping[str, str]) -> tuple[int, list[str]]:
    """Run a command, its prints on to ours; return its status and the last lines of them."""
    import subprocess  # not for planning

    log = sys.stdout.fileno()
    os.write(log, f"$ {shlex.join(command)}\n".encode(errors="surrogateescape"))
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        raise StageError(f"{command[0]} cannot be run: {error.strerror}") from None
    tail = bytearray()
    assert process.stdout is not None

    def pass_on(descriptor: int) -> None:
        while chunk := os.read(descriptor, 1 << 16):
            os.write(log, chunk)
            tail[:] = (tail + chunk)[-TAIL_BYTES:]

    reader = threading.Thread(target=pass_on, args=(process.stdout.fileno(),), daemon=True)
    reader.start()
    status = process.wait()
    reader.join(DRAIN_SECONDS)  # no longer, as what it left running may never close its output
    lines = tail.decode(errors="replace").splitlines()
    return status, [line for line in lines if line.strip()][-TAIL_LINES:]


def _files(path: Path) -> Iterator[Path]:
    """Yield the files at or below a path."""
    yield from (file for file in (path, *path.rglob("*")) if file.is_file())


def _discard(folder: Path, keep: set[Path]) -> None:
    """Remove what is in a folder but for the files and folders in ``keep``."""
    for path in list(folder.iterdir()):
        if path in keep:
            continue
        if path.is_dir() and not path.is_symlink() and any(path in other.parents for other in keep):
            _discard(path, keep)
        else:
            remove_tree(path)


def _part_from_others(file: Path) -> None:
    """Make a file its own that shares its content with others by hard links."""
    if file.stat().st_nlink > 1:
        copy = file.with_name(f"{file.name}.copied")
        shutil.copy(file, copy)
        copy.replace(file)
