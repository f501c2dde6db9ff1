"""Runs commands as forks of a process that has imported what they need, which takes half of a small run's time.

``python -m tests.endurance.forks`` reads a request a line: ``argv``, ``folder``, ``env``, and the files ``out`` and
``err``; it answers with the exit status. It does nothing else, so that no thread is there that a fork would lack.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRELOADED = (
    "csv", "diskcache", "importlib.metadata", "yaml", "stages.provider", "stagegraph.cli.main", "stagegraph.cli.run",
    "stagegraph.execution.sandbox", "stagegraph.execution.scheduler", "stagegraph.planning.definitions",
    "stagegraph.planning.summary", "stagegraph.planning.syntax", "stagegraph.query.history", "stagegraph.spec.load",
    "stagegraph.store.memo", "stagegraph.store.pins",
)  # fmt: skip


@functools.cache
def _server(env: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.endurance.forks"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=dict(env), stdin=pipe, stdout=pipe, text=True)


def run(argv: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command of the pipeline in ``folder``; ``env`` is its whole environment."""
    server = _server(tuple((name, value) for name, value in env.items() if not name.startswith("LAB_")))
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        request = {"argv": argv, "folder": str(folder), "env": env, "out": out.name, "err": err.name}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        said = (file.read().decode(errors="replace") for file in (out, err))
        return subprocess.CompletedProcess(argv, status, *said)


def _become(request: dict[str, Any]) -> None:
    """Be the process of a command, from where its ``main`` begins."""
    code: Any = 1
    try:
        os.setsid()
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["env"])
        for number, path in enumerate((os.devnull, request["out"], request["err"])):
            os.dup2(os.open(path, os.O_RDWR), number)
        sys.argv[1:] = request["argv"]
        importlib.reload(sys.modules["sitecustomize"])  # with this environment, as where a process starts
        sys.modules["stagegraph.cli.main"].main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - whatever it is, the caller looks for its traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _serve() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
