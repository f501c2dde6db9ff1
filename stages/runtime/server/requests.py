"""Parses the bodies of /v1/chat/completions and /v1/completions into the runtime's own types."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import RequestError
from stages.runtime.sampling import Settings, of_checkpoint
from stages.runtime.server import drafts, tools
from stages.runtime.server.answer import AnswerOptions
from stages.runtime.server.errors import ApiError
from stages.runtime.server.fields import DEEPEST, Fields, parsed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stages.runtime.documents import JsonObject
    from stages.runtime.server.answer import Mask
    from stages.runtime.server.engine import Engine
    from stages.runtime.server.tools import Tools

MOST_ANSWERS = 16  # of one request
MOST_STOPS, LONGEST_STOP = 16, 1024
_LARGEST = 2**31 - 1

_COMMON = {
    "model", "stream", "stream_options", "stop", "n", "seed", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "speculate",
}  # fmt: skip
# What says who asks, or what the service may do with it: nothing here depends on it.
_IDLE = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
_CHAT = _COMMON | _IDLE | {
    "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs", "response_format", "tools",
    "tool_choice", "parallel_tool_calls",
}  # fmt: skip
_TEXT = _COMMON | _IDLE | {"prompt", "echo", "best_of", "suffix"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning_content"}


@dataclass(frozen=True)
class Wanted:
    """A parsed request: the ids of its prompts, each with one answer for each of ``seeds``.

    ``masks`` makes the grammar of an answer, None for no grammar; ``tools`` are the functions that it may call.
    """

    prompts: Sequence[Sequence[int]]
    options: AnswerOptions
    seeds: Sequence[int]
    stream: bool
    include_usage: bool
    masks: Callable[[], Mask | None] = lambda: None
    tools: Tools | None = None


def chat(body: Any, engine: Engine) -> Wanted:
    """Parse a body of /v1/chat/completions; :class:`ApiError` if it is wrong or not supported."""
    fields = Fields(body, _CHAT)
    messages = [_message(message, at) for at, message in enumerate(fields.take("messages", list, []))]
    if not messages:
        raise fields.wrong("messages", "a list of at least one message")
    called = tools.read(fields, engine.tokenizer.tool_template())
    variables = {**fields.take("chat_template_kwargs", dict, {}), "tools": called.given if called else None}
    masks = _masks(fields, engine, called)
    masks()  # so that an error in the grammar is an error of the request
    try:
        prompt = engine.tokenizer.chat(messages, variables=variables)
    except RequestError as error:
        raise ApiError(str(error), param="messages") from None
    top = fields.integer("top_logprobs", None, 0, 20)
    logprobs = fields.take("logprobs", bool, default=False)
    if top is not None and not logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    limit = fields.integer("max_completion_tokens", fields.integer("max_tokens", None, 1, _LARGEST), 1, _LARGEST)
    found = _wanted(fields, engine, [prompt], limit or _LARGEST, (top or 0) if logprobs else None)
    options = replace(found.options, specials=called is not None)  # a call may begin with one
    return replace(found, options=options, masks=masks, tools=called)


def _masks(fields: Fields, engine: Engine, called: Tools | None) -> Callable[[], Mask | None]:
    """Return a function that makes the grammar of an answer, for its response_format and for calls."""
    form = Fields(fields.take("response_format", dict, {"type": "text"}), where="response_format")
    kind = form.raw("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise form.wrong("type", "text, json_object or json_schema")
    schema: Any = {"type": "object"} if kind == "json_object" else None
    if kind == "json_schema":
        known = {"name", "description", "schema", "strict"}
        schema = Fields(form.raw("json_schema"), known, where=form.path("json_schema")).raw("schema")
    if called is None:
        return lambda: None if kind == "text" else engine.grammars.json(schema, "response_format")
    if kind != "text":
        engine.grammars.json(schema, "response_format")  # an error in it is not one of the tools
    return lambda: called.mask(engine.grammars, schema)


def text(body: Any, engine: Engine) -> Wanted:
    """Parse a body of /v1/completions; :class:`ApiError` if it is wrong or not supported."""
    fields = Fields(body, _TEXT)
    if fields.take("suffix", str, ""):
        raise ApiError("suffix is not supported", param="suffix")
    if fields.integer("best_of", fields.integer("n", 1, 1, MOST_ANSWERS), 1, MOST_ANSWERS) != (fields.raw("n") or 1):
        raise ApiError("best_of must equal n: answers are not ranked", param="best_of")
    logprobs = fields.integer("logprobs", None, 0, 20)
    echo = fields.take("echo", bool, default=False)
    prompts = [_ids(fields, prompt, engine) for prompt in _prompts(fields)]
    limit = fields.integer("max_tokens", 16, 0 if echo else 1, _LARGEST)
    assert limit is not None
    found = _wanted(fields, engine, prompts, limit, logprobs)
    return replace(found, options=replace(found.options, echo=echo))


def _wanted(
    fields: Fields,
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    limit: int,
    logprobs: int | None,
) -> Wanted:
    count = fields.integer("n", 1, 1, MOST_ANSWERS) or 1
    if count * len(prompts) > MOST_ANSWERS:
        raise ApiError(
            f"the request asks for {count * len(prompts)} answers; at most {MOST_ANSWERS} are allowed", param="n"
        )
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    first = secrets.randbits(63) if seed is None else seed % 2**64
    streaming = fields.take("stream", bool, default=False)
    given = fields.raw("stream_options")
    if given is not None and not streaming:
        raise ApiError("stream_options needs stream to be true", param="stream_options")
    stream_options = Fields(given or {}, {"include_usage", "include_obfuscation"}, where="stream_options")
    stops = [stop.encode() for stop in fields.texts("stop", MOST_STOPS)]
    if any(len(stop) > LONGEST_STOP for stop in stops):
        raise fields.wrong("stop", f"a string of at most {LONGEST_STOP} bytes")
    speculate = fields.integer("speculate", engine.speculate, 0, drafts.MOST) or 0
    if speculate and not engine.can_speculate:
        raise ApiError(
            "speculate is not supported for a recurrent model, whose state cannot be rolled back", param="speculate"
        )
    options = AnswerOptions(
        settings=_settings(fields, engine),
        max_tokens=limit,
        stops=tuple(stops),
        frequency_penalty=fields.number("frequency_penalty", 0, -2, 2),
        presence_penalty=fields.number("presence_penalty", 0, -2, 2),
        logit_bias=_biases(fields, engine),
        logprobs=logprobs,
        speculate=speculate,
    )
    return Wanted(
        prompts=prompts,
        options=options,
        seeds=[first + (at << 64) for at in range(count)],
        stream=streaming,
        include_usage=stream_options.take("include_usage", bool, default=False),
    )


def _settings(fields: Fields, engine: Engine) -> Settings:
    """Return the sampling settings: of the request, else of the checkpoint, else a temperature of 1."""
    usual = Settings(**{"temperature": 1.0, **of_checkpoint(engine.manifest.sampling)})
    top_k = fields.integer("top_k", usual.top_k, -1, _LARGEST) or 0
    return Settings(
        temperature=fields.number("temperature", usual.temperature, 0, 100),
        top_k=max(top_k, 0),  # other servers use -1 for all
        top_p=max(fields.number("top_p", usual.top_p, 0, 1), 1e-9),  # 0 means the likeliest token only
        min_p=fields.number("min_p", usual.min_p, 0, 1),
        repetition_penalty=fields.number("repetition_penalty", usual.repetition_penalty, 0.01, 100),
    )


def _biases(fields: Fields, engine: Engine) -> dict[int, float]:
    found = {}
    for name, value in fields.take("logit_bias", dict, {}).items():
        known = name.isdecimal() and len(name) < 10 and int(name) < engine.tokenizer.active_vocab_size
        if not known or isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise fields.wrong("logit_bias", "token ids of the vocabulary with a number from -100 to 100 each")
        found[int(name)] = float(value)
    return found


def _prompts(fields: Fields) -> list[Any]:
    prompt = fields.raw("prompt")
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    prompts = prompt if several else [prompt]
    if not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise fields.wrong("prompt", "a string or a list of token ids, or a list of these")
    return list(prompts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _ids(fields: Fields, prompt: str | list[int], engine: Engine) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    try:
        return engine.tokenizer.prompt(prompt)
    except RequestError as error:
        raise ApiError(str(error), param=fields.path("prompt")) from None


def _message(message: Any, at: int) -> JsonObject:
    """Return a message in the form for templates: its content is one text, the arguments of a call are an object."""
    fields = Fields(message, _MESSAGE, where=f"messages[{at}]")
    role = fields.take("role", str)
    if role not in _ROLES:
        raise fields.wrong("role", f"one of {', '.join(_ROLES)}")
    found: dict[str, object] = {"role": "system" if role == "developer" else role, "content": _content(fields)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in fields:
            found[name] = fields.take(name, str)
    if "tool_calls" in fields:
        calls = enumerate(fields.take("tool_calls", list))
        found["tool_calls"] = [_call(call, f"{fields.path('tool_calls')}[{n}]") for n, call in calls]
    return found


def _content(fields: Fields) -> str:
    content = fields.raw("content")
    if isinstance(content, list):
        texts = []
        for at, part in enumerate(content):
            inner = Fields(part, where=f"{fields.path('content')}[{at}]")
            if inner.raw("type") not in ("text", "refusal"):
                raise inner.wrong("type", "text: this model reads text only")
            texts.append(inner.take(inner.raw("type"), str, ""))
        return "\n".join(texts)
    found: str = fields.take("content", str, "")
    return found


def _call(call: Any, where: str) -> JsonObject:
    fields = Fields(call, {"id", "type", "function", "index"}, where=where)
    function = Fields(fields.raw("function"), {"name", "arguments"}, where=fields.path("function"))
    arguments = function.take("arguments", str, "{}")
    try:
        given = parsed((arguments or "{}").encode())
    except ValueError:
        raise function.wrong("arguments", f"JSON nested at most {DEEPEST} levels deep") from None
    return {
        "id": fields.take("id", str, ""),
        "type": "function",
        "function": {"name": function.take("name", str, ""), "arguments": given},
    }
