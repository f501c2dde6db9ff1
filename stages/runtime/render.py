"""Render a chat template in a process of its own: it comes with a checkpoint, and may loop, grow or reach for more.

``python -I render.py`` reads ``{"template", "variables"}`` as JSON and writes ``{"text"}`` or ``{"error"}``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from stages.runtime.errors import RequestError

SECONDS = 5
MEMORY = 1 << 29
MAX_CHARACTERS = 1 << 20


def render(template: str, variables: dict[str, Any]) -> str:
    """Return the rendered text; :class:`RequestError` if it fails, or exceeds its time, memory or length."""
    request = json.dumps({"template": template, "variables": variables})
    command = [sys.executable, "-I", "-c", _CHILD, str(Path(__file__).resolve().parents[2])]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=SECONDS, check=False)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise RequestError(f"the chat template ran for more than {SECONDS} seconds; leave out --chat") from None
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise RequestError(f"the chat template could not be rendered: {last}; leave out --chat") from None
    if "error" in answer:
        raise RequestError(f"the chat template could not be rendered: {answer['error']}; leave out --chat")
    return str(answer["text"])


_CHILD = "import sys; sys.path.append(sys.argv[1]); from stages.runtime.render import child; child()"


def child() -> None:
    """Answer one request on the standard streams, within limits that the kernel holds."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    request = json.load(sys.stdin)
    try:
        answer = {"text": _render(request["template"], request["variables"])}
    except Exception as error:  # noqa: BLE001 - a template may raise anything; it is reported, not handled
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    sys.stdout.write(json.dumps(answer))


def _render(template: str, variables: dict[str, Any]) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # As transformers sets it up, so that a template means here what it means there.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    pieces, size = [], 0
    for piece in environment.from_string(template).generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise ValueError(f"more than {MAX_CHARACTERS:,} characters")
    return "".join(pieces)


def _refuse(message: str) -> str:
    raise ValueError(message)
