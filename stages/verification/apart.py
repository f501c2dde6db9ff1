"""Runs a module that needs torch in a separate process: torch never shares one with the runtime under test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.problems import ProblemsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stages.documents.files import JsonObject

    Progress = Callable[[int, int, str], None]

INSTEAD = "set reference to recorded or none to go without it"
_PROGRESS = "progress"  # how a line of the other process begins that says how far it is


class LiveError(ProblemsError):
    """The reference could not be computed; ``problems`` says why."""


def call(module: str, request: JsonObject, progress: Progress, instead: str = INSTEAD) -> dict[str, np.ndarray]:
    """Run ``python -m module REQUEST.json RESULT.npz`` and return its arrays; :class:`LiveError` if it fails.

    The process tells ``progress`` how far it is with :func:`say`. ``instead`` is what a user can do without it.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w+", errors="replace") as errors:
        request_file, result_file = Path(folder) / "request.json", Path(folder) / "result.npz"
        request_file.write_text(json.dumps(request, default=str), "utf-8")
        # An empty entry would be the working directory, which -P keeps out: nothing that lies there may be imported.
        inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        path = os.pathsep.join([str(Path(__file__).parents[2]), *inherited])
        with subprocess.Popen(
            [sys.executable, "-P", "-m", module, request_file, result_file],
            # Threads that wait for one another sleep: on a busy machine spinning takes the time of those waited for.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                _pass_on(line, progress)
        if process.returncode:
            code = process.returncode
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            errors.seek(0)
            last = "\n".join(errors.read().strip().splitlines()[-3:])
            raise LiveError(f"the original model, run by torch, ended with {how}: {last}; {instead}")
        with np.load(result_file) as result:
            return dict(result)


def _pass_on(line: str, progress: Progress) -> None:
    word, *rest = line.rstrip("\n").split(" ", 3)
    if word == _PROGRESS and len(rest) == 3:
        progress(int(rest[0]), int(rest[1]), rest[2])


def say(done: int, total: int, unit: str) -> None:
    """Tell whoever runs this process that ``done`` of ``total`` things called ``unit`` are done."""
    sys.stdout.write(f"{_PROGRESS} {done} {total} {unit}\n")
    sys.stdout.flush()
