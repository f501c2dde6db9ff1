"""Function calls: passes functions to the chat template, and finds calls in the model's answers."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.runtime.server.errors import ApiError
from stages.runtime.server.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stages.runtime.documents import JsonObject
    from stages.runtime.server.answer import Mask
    from stages.runtime.server.documents import Function, ToolCall
    from stages.runtime.server.grammar import Grammars

MOST = 128  # functions of one request
_ARGUMENTS = ("arguments", "parameters")  # names that templates use for the arguments of a call


@dataclass(frozen=True)
class Style:
    """The format of calls in a model family: ``sign``, ``opening``, JSON, ``closing``.

    ``arguments`` is the key of the arguments in the JSON.
    """

    sign: str = ""
    opening: str = ""
    closing: str = ""
    arguments: str = "arguments"


# Text in a chat template -> the format of calls of its model; the first match counts.
STYLES = {
    "<tool_call>": Style("<tool_call>", "\n", "\n</tool_call>"),  # Hermes, Qwen, SmolLM
    "[TOOL_CALLS]": Style("[TOOL_CALLS]", " [", "]"),  # Mistral
    '"parameters"': Style(arguments="parameters"),  # Llama
}
_PLAIN = Style()


@dataclass(frozen=True)
class Tools:
    """The functions that a model may call, in the form for the chat template.

    ``must`` are the functions of which one must be called; empty if the model may also answer with text.
    """

    given: Sequence[JsonObject]
    style: Style
    must: Sequence[str]
    parallel: bool

    def mask(self, grammars: Grammars, schema: Any = None) -> Mask | None:
        """Return a grammar for a call, or for a call or JSON of ``schema``; None if the answer is not constrained."""
        if not self.must and schema is None:
            return None
        names = self.must or [tool["function"]["name"] for tool in self.given]
        functions = [tool["function"] for tool in self.given if tool["function"]["name"] in names]
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    self.style.arguments: function.get("parameters") or {"type": "object"},
                },
                "required": ["name", self.style.arguments],
                "additionalProperties": False,
            }
            for function in functions
        ]
        begin, end = json.dumps(self.style.sign + self.style.opening), json.dumps(self.style.closing)
        rules = [f"calling: {begin} call {end}", f"call: %json {json.dumps({'anyOf': calls})}"]
        if self.must or schema is None:
            return grammars.lark("\n".join(["start: calling", *rules]), "tools")
        rules += ["start: calling | answer", f"answer: %json {json.dumps(schema)}"]
        return grammars.lark("\n".join(rules), "tools, or response_format,")


def read(fields: Fields, template: str) -> Tools | None:
    """Return the functions of a request; None for one without, or whose ``tool_choice`` is ``"none"``."""
    given = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(fields.take("tools", list, []))]
    parallel = fields.take("parallel_tool_calls", bool, default=True)
    choice = fields.raw("tool_choice") or ("auto" if given else "none")
    if len(given) > MOST:
        raise fields.wrong("tools", f"at most {MOST}")
    names = [tool["function"]["name"] for tool in given]
    if isinstance(choice, dict):
        function = Fields(Fields(choice, {"type", "function"}, where="tool_choice").raw("function"), {"name"})
        choice = function.take("name", str, "")
        if choice not in names:
            raise ApiError(f"tool_choice names {choice!a:.80}, which is not among the tools", param="tool_choice")
        must = [choice]
    elif choice in ("auto", "none", "required"):
        must = names if choice == "required" else []
    else:
        raise fields.wrong("tool_choice", "none, auto, required or a function")
    if not given or choice == "none":
        if must or choice == "required":
            raise ApiError("tool_choice needs tools", param="tool_choice")
        return None
    if "tools" not in template:
        raise ApiError("this model's chat template does not support tools", param="tools")
    style = next((style for sign, style in STYLES.items() if sign in template), _PLAIN)
    return Tools(given, style, must, parallel)


def _tool(tool: Any, where: str) -> JsonObject:
    fields = Fields(tool, {"type", "function"}, where=where)
    if fields.raw("type") != "function":
        raise fields.wrong("type", "function")
    known = {"name", "description", "parameters", "strict"}
    function = Fields(fields.raw("function"), known, where=fields.path("function"))
    if not function.take("name", str, ""):
        raise function.wrong("name", "the name of a function")
    schema = function.take("parameters", dict, {"type": "object", "properties": {}})
    found = {"name": function.take("name", str), "description": function.take("description", str, "")}
    return {"type": "function", "function": {**found, "parameters": schema}}


class Reader:
    """Separates the text of an answer, which arrives in pieces, from the calls in it."""

    def __init__(self, tools: Tools) -> None:
        self._begin, self._end, self._parallel = tools.style.sign, tools.style.closing.strip(), tools.parallel
        self._names = {tool["function"]["name"] for tool in tools.given}
        self._buffer = ""

    def feed(self, text: str) -> str:
        """Return text that is certainly not part of a call; the rest is buffered until :meth:`finish`."""
        text = self._buffer + text
        if not self._begin:  # calls have no sign: the whole text is a call or is not
            if text.lstrip() and not text.lstrip().startswith("{"):
                self._buffer = ""
                return text
            self._buffer = text
            return ""
        at = text.find(self._begin)
        if at < 0:
            at = len(text) - next((n for n in range(len(self._begin) - 1, 0, -1) if text.endswith(self._begin[:n])), 0)
        self._buffer = text[at:]
        return text[:at]

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return the buffered text that is not a call, and the calls."""
        buffered, self._buffer = self._buffer, ""
        texts = buffered.split(self._begin) if self._begin else ["", buffered]
        content, calls = texts[0], []
        for text in texts[1:]:
            found = list(self._found(text.partition(self._end)[0] if self._end.startswith("<") else text))
            calls += found
            content += "" if found else self._begin + text
        return content, calls if self._parallel else calls[:1]

    def _found(self, text: str) -> Iterator[ToolCall]:
        """Yield the calls in JSON: one, several in a list, or several separated by semicolons."""
        decoder = json.JSONDecoder()
        text = text.strip()
        while text:
            try:
                document, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                return
            for call in document if isinstance(document, list) else [document]:
                if isinstance(call, dict) and call.get("name") in self._names:
                    arguments: Any = next((call[name] for name in _ARGUMENTS if name in call), {})
                    shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                    function: Function = {"name": call["name"], "arguments": shown}
                    yield {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
            text = text[end:].lstrip(" \n;,]")
