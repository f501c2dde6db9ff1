"""A forked process that is given hostile cases one after another, and what it did in each, seen from outside.

A case must be taken, or refused with problems that a person can read: no other exception, no signal, no more than
:data:`CPU_SECONDS` or :data:`MEMORY`, no waiting for what never comes (a FIFO, a lock), no file opened for writing,
renamed or removed outside its own folder, no pickle and no code of the folder run.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_SECONDS = 10.0
STILL = 20.0  # seconds in which all sleep: a process that a busy machine keeps waiting is ready to run instead
TICK = 0.2  # seconds between two looks
MEMORY = 1 << 30  # bytes of one process
CEILING = 6 << 30  # of a process: the machine's protection, far above the limit that is tested
LONGEST = 4400  # characters of one problem
MOST = 60  # problems of one case: 20 of a kind, of a few kinds
WRITES = {
    "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.putenv", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "shutil.move",
    "shutil.rmtree", "socket.connect", "socket.getaddrinfo",
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """``taken``, or refused with ``problems``; ``fault`` says which promise was broken, empty where none was."""

    taken: bool
    problems: tuple[str, ...]
    fault: str
    cpu: float
    peak: int


class Judge:
    """Runs ``target(folder)``, which returns its problems, in a fork of this process; a broken fork is replaced."""

    def __init__(self, target: Callable[[Path], list[str]], root: Path) -> None:
        self._target, self._root = target, root
        self._pid = 0
        self._number = 0
        self.cpu = 0.0  # of all cases

    def folder(self) -> Path:
        """Make a new folder for a case."""
        self._number += 1
        folder = self._root / f"{self._number}"
        (folder / "tmp").mkdir(parents=True)
        return folder

    def judge(self, folder: Path) -> Verdict:
        """Run one case and remove its folder."""
        try:
            return self._judge(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _judge(self, folder: Path) -> Verdict:
        if not self._pid:
            self._start()
        before = _cpu(self._pid)
        os.write(self._requests, (json.dumps(str(folder)) + "\n").encode())
        answer, fault, still = b"", "", 0.0
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], TICK)
            if ready:
                piece = os.read(self._answers, 1 << 20)
                if not piece:
                    fault = "the process ended"
                    break
                answer += piece
            elif _cpu(self._pid) - before > CPU_SECONDS:
                fault = f"more than {CPU_SECONDS:.0f} CPU seconds"
                break
            else:
                still = still + TICK if all(map(_sleeps, _family(self._pid))) else 0.0
                if still > STILL:
                    fault = f"nothing has run for {STILL:.0f} seconds"
                    break
        spent, peak = _cpu(self._pid) - before, max(map(_peak, _family(self._pid)), default=0)
        self.cpu += spent
        if fault:
            fault += self._end()
            return Verdict(taken=False, problems=(), fault=fault, cpu=spent, peak=peak)
        said = json.loads(answer)
        fault = said["fault"]
        if not fault and spent > CPU_SECONDS:
            fault = f"{spent:.1f} CPU seconds"
        if not fault and peak > MEMORY:
            fault = f"{peak >> 20} MiB of memory"
            self._end()
        return Verdict(not said["problems"], tuple(said["problems"]), fault or _unfit(said["problems"]), spent, peak)

    def close(self) -> None:
        """End the process."""
        if self._pid:
            self._end()

    def _start(self) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._requests)
            os.close(self._answers)
            os.setpgid(0, 0)
            try:
                _serve(self._target, requests, answers)
            finally:
                os._exit(1)
        os.close(requests)
        os.close(answers)

    def _end(self) -> str:
        """Stop the process and all it started; say by what it had ended where it had."""
        for pid in _family(self._pid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        os.close(self._requests)
        os.close(self._answers)
        self._pid = 0
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return f" by signal {number}" if number not in (0, signal.SIGKILL) else ""


def written(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by name."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _unfit(problems: list[str]) -> str:
    """Say what is wrong with the problems themselves."""
    if len(problems) > MOST:
        return f"{len(problems)} problems"
    for problem in problems:
        if not problem.strip() or len(problem) > LONGEST:
            return f"a problem of {len(problem)} characters: {problem[:200]!r}"
        if "Traceback (most" in problem:
            return f"a traceback in a problem: {problem[:2000]}"
    return ""


def _serve(target: Callable[[Path], list[str]], requests: int, answers: int) -> None:
    log = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(log, descriptor)
    resource.setrlimit(resource.RLIMIT_DATA, (CEILING, CEILING))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seen: list[str] = []
    own = [""]
    sys.addaudithook(lambda event, arguments: _audit(event, arguments, own, seen))
    with os.fdopen(requests) as lines:
        for line in lines:
            folder = Path(json.loads(line))
            own[0] = str(folder)
            seen.clear()
            tempfile.tempdir = str(folder / "tmp")
            for pid in (os.getpid(), *_family(os.getpid())):
                with contextlib.suppress(OSError):
                    Path(f"/proc/{pid}/clear_refs").write_text("5")
            seen.clear()
            os.write(answers, (json.dumps(_case(target, folder, seen)) + "\n").encode())


def _case(target: Callable[[Path], list[str]], folder: Path, seen: list[str]) -> dict[str, Any]:
    problems, fault = [], ""
    try:
        problems = [str(problem) for problem in target(folder)]
    except BaseException:  # noqa: BLE001 - whatever it is, it is the finding
        fault = traceback.format_exc()[-4000:]
    return {"problems": problems, "fault": fault or "\n".join(seen[:5])}


def _audit(event: str, arguments: tuple[Any, ...], own: list[str], seen: list[str]) -> None:
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return
        paths = [path]
    elif event in WRITES:
        last = event in ("os.link", "os.symlink")  # what they lead to is not written
        paths = [value for value in arguments[1 if last else 0 : 2] if isinstance(value, str | bytes)]
    elif event == "import":
        module, file = arguments[:2]
        if isinstance(file, str) and own[0] and file.startswith(own[0]):
            seen.append(f"import {module} of {file}")
        return
    else:
        return
    for path in paths:
        if isinstance(path, int) or (event in ("os.remove", "os.rmdir") and arguments[1] != -1):
            continue  # by a descriptor, which was opened by a path that was looked at
        text = os.path.realpath(os.fsdecode(path))
        if not text.startswith((own[0] + os.sep, "/dev/null", "/proc/")) and text != own[0]:
            seen.append(f"{event} {text}")


def _family(pid: int) -> list[int]:
    """Return a process and those below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += _family(int(child))
    return found


def _cpu(pid: int) -> float:
    """Return the CPU seconds of a process, of those it waited for and of those it has."""
    total = 0
    for member in _family(pid):
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def _sleeps(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
    return False


def _peak(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0
