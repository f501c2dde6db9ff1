"""Faults in file operations, in every Python process of a run: Python imports a module of this name by itself.

So the product holds no code for it, and scheduler and workers are reached alike. Audit events stand before every
system call that changes names; wrappers stand before the few that have none (write, fsync, flock, and sqlite's
commit). Every operation below ``LAB_ROOT`` has a number, counted across processes by the length of ``LAB_TRACE``.

``LAB_FAULT`` is ``kill:N`` (this process), ``killall:N`` (and its parent, if it is a worker), or an error's name:
``ENOSPC:N`` at operation N, ``ENOSPC:N+`` from then on. ``LAB_DENY`` is a list ``link:EPERM,flock:ENOLCK``: such
operations fail always. ``LAB_CLOCK`` is the seconds that the clock falls behind with every look at it.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import signal
import sqlite3
import sys
import time
from typing import Any

WIDTH = 120  # bytes of a line of the trace, so that its end tells its number
NAMES = {
    "os.rename": ("rename", 1),
    "os.link": ("link", 1),
    "os.remove": ("unlink", 0),
    "os.rmdir": ("rmdir", 0),
    "os.mkdir": ("mkdir", 0),
    "os.chmod": ("chmod", 0),
}  # audit event -> operation, position of the path that it changes
SIZES = {"ENOSPC": {"rename", "link", "mkdir", "create", "write", "fsync", "commit"}}  # what can want for room

root = os.environ.get("LAB_ROOT", "")
trace = os.environ.get("LAB_TRACE", "")
fault, _, when = os.environ.get("LAB_FAULT", "").partition(":")
number, onwards = int(when.rstrip("+") or 0), when.endswith("+")
deny = dict(each.split(":") for each in os.environ.get("LAB_DENY", "").split(",") if each)
busy = False  # what is done here is not counted
write, fsync, flock, sendfile, connect = os.write, os.fsync, fcntl.flock, os.sendfile, sqlite3.connect
file_open = io.open


def operation(name: str, path: Any, folder: int = -1) -> None:
    """Count one operation on a path, and fail it or die if its time has come."""
    global busy  # noqa: PLW0603 - a hook has no other place
    if busy:
        return
    busy = True
    try:
        if not (place := _place(path, folder)):
            return
        _deny(name)
        if trace:
            _strike(name, _number(f"{os.getpid()} {name} {place}"))
    finally:
        busy = False


def _place(path: Any, folder: int) -> str:
    """Return a path's name below the root, or nothing."""
    try:
        text = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
        if folder >= 0:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    except (OSError, TypeError):
        return ""
    text = os.path.abspath(text)
    return text[len(root) + 1 :] if text.startswith(f"{root}/") else ""


def _deny(name: str) -> None:
    if name in deny:
        raise _error(deny[name], name)


def _number(text: str) -> int:
    descriptor = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        write(descriptor, text.encode(errors="replace")[: WIDTH - 1].replace(b"\n", b"?").ljust(WIDTH - 1) + b"\n")
        return os.lseek(descriptor, 0, os.SEEK_CUR) // WIDTH
    finally:
        os.close(descriptor)


def _strike(name: str, now: int) -> None:
    if not fault or (now < number if onwards else now != number):
        return
    if fault == "killall" and "stagegraph.execution.worker" in sys.orig_argv:
        os.kill(os.getppid(), signal.SIGKILL)
    if fault in {"kill", "killall"}:
        os.kill(os.getpid(), signal.SIGKILL)
    if name in SIZES.get(fault, {name}):
        raise _error(fault, name)


def _error(code: str, name: str) -> Exception:
    if name == "commit":
        error = sqlite3.OperationalError("database or disk is full" if code == "ENOSPC" else "disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL if code == "ENOSPC" else sqlite3.SQLITE_IOERR
        return error
    number = getattr(errno, code)
    return OSError(number, os.strerror(number))


def audit(event: str, args: tuple[Any, ...]) -> None:
    """Hear of every call that changes names."""
    if event in NAMES and not busy:
        name, position = NAMES[event]
        operation(name, args[position], args[-1])
    elif event == "open" and not busy and isinstance(args[2], int) and args[2] & os.O_CREAT:
        operation("create", args[0])


class Raw(io.FileIO):
    """A file whose writes are counted, and torn: half of what is written is there when the process dies."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) > 1 and fault.startswith("kill"):
            half = len(view) // 2
            super().write(view[:half])
            operation("write", self.fileno())
            return half + (super().write(view[half:]) or 0)
        operation("write", self.fileno())
        return super().write(data) or 0


def counted_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
    """Open as usual, but with a :class:`Raw` file below what is written."""
    if not set(mode) & set("wxa") or "+" in mode or isinstance(file, int) or buffering == 0:
        return file_open(file, mode, buffering, *args, **kwargs)
    raw = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")))
    if "b" in mode:
        return raw
    names = ("encoding", "errors", "newline")
    return io.TextIOWrapper(raw, **dict(zip(names, args, strict=False)), **kwargs)


class Connection(sqlite3.Connection):
    """A connection whose commits are counted."""

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if sql == "COMMIT":
            operation("commit", root + "/index")
        return super().execute(sql, *args)


def counted_connect(database: Any, *args: Any, **kwargs: Any) -> sqlite3.Connection:
    """Connect as usual, with counted commits."""
    return connect(database, *args, **{"factory": Connection, **kwargs})


def wrap(real: Any, name: str) -> Any:
    """Return a function on a descriptor that is counted first."""

    def counted(descriptor: int, *args: Any) -> Any:
        operation(name, descriptor)
        return real(descriptor, *args)

    return counted


def back(real: Any) -> Any:
    """Return a clock that goes backwards."""
    step, looks = float(os.environ["LAB_CLOCK"]), [0]

    def late() -> Any:
        looks[0] += 1
        behind = step * looks[0]
        return real() - (int(behind * 1e9) if real is time_ns else behind)

    return late


if root:
    os.write, os.fsync, os.sendfile = wrap(write, "write"), wrap(fsync, "fsync"), wrap(sendfile, "write")
    fcntl.flock = wrap(flock, "flock")
    io.open = builtins.open = counted_open
    sqlite3.connect = counted_connect
    sys.addaudithook(audit)
if "LAB_CLOCK" in os.environ:
    now, time_ns = time.time, time.time_ns
    time.time, time.time_ns = back(now), back(time_ns)
