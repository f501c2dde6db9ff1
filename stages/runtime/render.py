"""Render a chat template in a process of its own: it comes with a checkpoint, and may loop, grow or reach for more.

The environment is that of transformers 5 (``transformers.utils.chat_template_utils``), so that a template means here
what it means there; it always is jinja2's immutable sandbox. ``child`` reads one request as JSON: the ``template``,
the sets of ``variables`` to render it with, one after another, and the ``now`` of its clock; it answers with the
``texts``, each a string or ``{"error": ...}``, and with the template's own ``literals``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import traceback
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stages.runtime.documents import JsonObject

CPU_SECONDS = 5
MEMORY = 1 << 29
MAX_CHARACTERS = 1 << 20
CLOCK = "strftime_now"  # the function by which a template asks for the date
MAX_SHOWN = 500  # characters of an error that the template or jinja2 words
OLDEST_JINJA = (3, 1, 6)  # earlier sandboxes can be left
INSTALL = "pip install 'jinja2>=3.1.6'"


@dataclass(frozen=True)
class Rendering:
    """What a template gave: a text or an error for each set of variables, and the text that it says itself.

    ``literals`` are its raw text and its string constants, with NUL between them.
    """

    texts: Sequence[str | RequestError]
    literals: str


def render(template: str, variables: JsonObject) -> str:
    """Return the rendered text; :class:`RequestError` if it fails, or exceeds its time, memory or length."""
    return checked(render_all(template, [variables]).texts[0])


def checked(text: str | RequestError) -> str:
    """Return a rendered text; raise what stands in its place."""
    if isinstance(text, RequestError):
        raise text
    return text


def render_all(template: str, variables: Sequence[JsonObject], *, now: datetime | None = None) -> Rendering:
    """Render a template several times in one process; :class:`RequestError` if that itself fails.

    ``now`` is what the template's clock shows: None for the time it is. The limits are those of the whole.
    """
    request = json.dumps(
        {"template": template, "variables": list(variables), "now": None if now is None else now.isoformat()}
    )
    command = [sys.executable, "-I", "-c", _CHILD, str(Path(__file__).resolve().parents[2])]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise RequestError(f"the chat template could not be rendered: {_end(done)}") from None
    if "error" in answer:
        raise RequestError(f"the chat template could not be rendered: {answer['error']}")
    texts = [
        text if isinstance(text, str) else RequestError(f"the chat template could not be rendered: {text['error']}")
        for text in answer["texts"]
    ]
    return Rendering(texts, answer["literals"])


def _end(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it was stopped after {CPU_SECONDS} seconds of computing, or by signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]


_CHILD = "import sys; sys.path.append(sys.argv[1]); from stages.runtime.render import child; child()"


def child() -> None:
    """Answer one request on the standard streams, within limits that the kernel holds."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    request = json.load(sys.stdin)
    now = datetime.fromisoformat(request["now"]) if request["now"] else None
    try:
        template, literals = _compile(request["template"], now)
    except Exception as error:  # noqa: BLE001 - a template may raise anything; it is reported, not handled
        sys.stdout.write(json.dumps({"error": _message(error)}))
        return
    texts: list[str | dict[str, str]] = []
    for variables in request["variables"]:
        try:
            texts.append(_joined(template.generate(**variables)))
        except Exception as error:  # noqa: BLE001
            texts.append({"error": _message(error)})
    sys.stdout.write(json.dumps({"texts": texts, "literals": literals}))


def _joined(pieces: Iterable[str]) -> str:
    taken, size = [], 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise ValueError(f"more than {MAX_CHARACTERS:,} characters")
    return "".join(taken)


def _message(error: Exception) -> str:
    """Return what went wrong and in which line of the template."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    where = f"line {line}: " if line else ""
    # What a template raises itself is addressed to the reader as it stands.
    kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
    return f"{where}{kind}{str(error)[:MAX_SHOWN]}"


def _compile(source: str, now: datetime | None) -> tuple[Any, str]:
    """Return the template and its literal text."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(f"it needs jinja2, which is not installed: {INSTALL}") from None
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdecimal()) < OLDEST_JINJA:
        raise ValueError(f"jinja2 {jinja2.__version__} has a sandbox that templates can leave: {INSTALL}")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raiser(jinja2.exceptions.TemplateError),
        CLOCK: _clock(now),
        "dict": _Dictionary(),
        "namespace": _namespace(),
    }
    tree = environment.parse(source)
    literals = {node.data for node in tree.find_all(nodes.TemplateData)}
    literals |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return environment.from_string(source), "\0".join(sorted(literals))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is; jinja2's own filter escapes what HTML would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raiser(kind: type[Exception]) -> Callable[[str], str]:
    def raise_exception(message: str) -> str:
        raise kind(message)

    return raise_exception


def _clock(now: datetime | None) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:  # noqa: A002 - the name that templates know
        return (now or datetime.now()).strftime(format)  # noqa: DTZ005 - local time, as in transformers

    return strftime_now


class _Dictionary:
    """The ``dict`` of a template: makes dictionaries and is not the type, from which more could be reached."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _namespace() -> type:
    """Return the ``namespace`` of a template: jinja2's, without names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}: it begins with an underscore")

    class TemplateNamespace(Namespace):
        def __init__(*args: Any, **items: Any) -> None:  # an item may be called "self"
            self, *rest = args
            given = dict(*rest, **items)
            for name in given:
                check(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            Namespace.__setitem__(self, name, value)

    return TemplateNamespace


def _generation_tag() -> type:
    """Return the extension for ``{% generation %}``, which marks what the assistant said and writes it as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

        def written(self, caller: Callable[[], str]) -> str:
            return caller()

    return Generation
