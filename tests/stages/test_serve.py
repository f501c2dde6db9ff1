"""`serve` as clients see it: the official client, on a tiny bundle, over a real socket."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest

from stages.runtime import manifest
from stages.runtime.context import Context
from stages.runtime.session import Session
from stages.runtime.tokenizer import BundleTokenizer

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from stages.runtime.server import app as apps  # noqa: E402
from stages.runtime.server import card, command, requests  # noqa: E402 - needs what may be absent
from stages.runtime.server.drafts import Lookup  # noqa: E402
from stages.runtime.server.engine import Engine  # noqa: E402
from stages.runtime.server.tools import STYLES, Reader, Tools  # noqa: E402
from tests.support import bundles  # noqa: E402
from tests.support.local_server import Served, idle, serve  # noqa: E402

TEXT = "The old lighthouse keeper walked"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def engine(recorded) -> Iterator[Engine]:
    engine = Engine(manifest.read(recorded.bundle), tokens=1024)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def served(engine) -> Iterator[Served]:
    yield from serve(engine)


@pytest.fixture(scope="module")
def alone(recorded):
    """What a prompt's ids are continued with, greedily and by themselves."""
    return generating(manifest.read(recorded.bundle))


def generating(bundle):
    session, tokenizer = Session(bundle), BundleTokenizer(bundle.folder)

    return lambda ids, count: bundles.text_alone(session, tokenizer, ids, count)


@pytest.fixture(scope="module")
def logits(recorded):
    """The logits of the tokens that there are, after ids."""
    bundle = manifest.read(recorded.bundle)
    session, active = Session(bundle), BundleTokenizer(bundle.folder).active_vocab_size

    def after(ids: list[int]) -> np.ndarray:
        context = Context(session)
        found = context.read(ids)
        context.close()
        return found[:active].astype(np.float64)

    return after


def test_a_text_is_continued_as_generate_does(served, alone) -> None:
    answer = served.client.completions.create(model="tiny", prompt=TEXT, temperature=0, max_tokens=12)
    wanted = alone(served.engine.tokenizer.prompt(TEXT), 12)
    assert wanted
    assert answer.choices[0].text == wanted
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(served.engine.tokenizer.prompt(TEXT)),
        12,
    )


def test_a_conversation_streams_what_it_says_at_once(served, alone) -> None:
    request = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = served.client.chat.completions.create(**request)
    wanted = alone(served.engine.tokenizer.chat(HELLO), 12)
    assert whole.choices[0].message.content == wanted
    chunks = list(served.client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, "it was read a moment ago"


def test_logprobs_are_those_of_the_model(served, logits) -> None:
    answer = served.client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=3, logprobs=True, top_logprobs=4, logit_bias={"7": -100}
    )
    first = answer.choices[0].logprobs.content[0]
    found = logits(served.engine.tokenizer.chat(HELLO))
    wanted = found - np.log(np.exp(found).sum())
    assert [entry.logprob for entry in first.top_logprobs] == pytest.approx(sorted(wanted)[:-5:-1], abs=1e-4)
    assert len(answer.choices[0].logprobs.content) == 3
    assert bytes(first.bytes).decode(errors="replace") == first.token


def test_several_answers_differ_and_come_again_with_their_seed(served) -> None:
    request = {"model": "tiny", "prompt": TEXT, "max_tokens": 16, "temperature": 1.0, "n": 3, "seed": 11}
    first, second = (served.client.completions.create(**request) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3
    other = served.client.completions.create(**{**request, "seed": 12})
    assert [choice.text for choice in other.choices] != texts


def test_several_prompts_stop_strings_and_echo(served, alone) -> None:
    ids = served.engine.tokenizer.prompt(TEXT)
    text = alone(ids, 12)
    stop = text[4:6]
    answer = served.client.completions.create(
        model="tiny", prompt=[ids, [5, 6, 7]], temperature=0, max_tokens=12, stop=stop, echo=True
    )
    assert answer.choices[0].text == TEXT + text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[1].text.startswith(served.engine.tokenizer.decode([5, 6, 7]))


def test_a_prompt_is_echoed_with_what_the_model_made_of_it(served, logits) -> None:
    """As programs that compare answers ask: no token is made, and every token of the prompt has its logarithm."""
    ids = served.engine.tokenizer.prompt(TEXT)
    request = {"model": "tiny", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 3, "n": 2}
    answer = served.client.completions.create(**request)
    wanted = [logits(ids[: at + 1]) for at in range(len(ids) - 1)]
    wanted = [row - np.log(np.exp(row).sum()) for row in wanted]
    for choice in answer.choices:
        found = choice.logprobs
        assert (choice.text, choice.finish_reason) == (TEXT, "length")
        assert "".join(found.tokens) == TEXT
        assert found.text_offset == [len("".join(found.tokens[:at])) for at in range(len(ids))]
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        right = [row[token] for row, token in zip(wanted, ids[1:], strict=True)]
        assert found.token_logprobs[1:] == pytest.approx(right, abs=1e-4)
        best = [max(top.values()) for top in found.top_logprobs[1:]]
        assert best == pytest.approx([row.max() for row in wanted], abs=1e-4)
    assert answer.usage.completion_tokens == 0
    chunks = served.client.completions.create(**{**request, "max_tokens": 2, "temperature": 0}, stream=True)
    told = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == 1]
    assert "".join(choice.text for choice in told).startswith(TEXT)
    assert sum(len(choice.logprobs.tokens) for choice in told if choice.logprobs) == len(ids) + 2


def test_penalties_and_biases_change_what_is_picked(served, logits) -> None:
    ids = served.engine.tokenizer.prompt(TEXT)
    first, second = (int(token) for token in np.argsort(-logits(ids))[:2])

    def picked(**options) -> list[str]:
        answer = served.client.completions.create(
            model="tiny", prompt=ids, temperature=0, max_tokens=6, logprobs=0, **options
        )
        return answer.choices[0].logprobs.tokens

    said = {token: served.engine.tokenizer.piece(token).decode(errors="replace") for token in (first, second)}
    assert picked()[0] == said[first]
    assert picked(logit_bias={first: -100})[0] == said[second]
    assert picked(logit_bias={first: 100}) == [said[first]] * 6
    both = picked(logit_bias={first: 50, second: 49}, frequency_penalty=2)
    assert both == [said[first], said[second], said[first], said[second], said[first], said[second]]
    assert picked(logit_bias={first: 50, second: 40}, presence_penalty=2) == [said[first]] * 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": -1}, "temperature must be a number from 0 to 100, found -1"),
        ({"temprature": 1}, "unknown parameter temprature; did you mean temperature"),
        ({"n": 0}, "n must be a whole number from 1 to 16"),
        ({"n": True}, "n must be a whole number"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"messages": []}, "at least one message"),
        ({"messages": "Hello"}, "messages must be a list"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, r"messages\[0\].role must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
        ({"messages": [{"role": "user", "content": "x" * 20000}]}, "the context holds 512 tokens"),
        ({"stop": [""]}, "stop must be a string"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias must be token ids"),
        ({"seed": "x"}, "seed must be a whole number"),
    ],
)
def test_a_mistake_is_told_in_the_api_form(served, change, said) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, **change}
    with pytest.raises(openai.BadRequestError, match=said) as raised:
        served.client.post("/chat/completions", body=body, cast_to=object)
    assert raised.value.type == "invalid_request_error"


def test_what_is_no_request_is_refused(served) -> None:
    assert served.post("/v1/chat/completions", b"{")[0] == 400
    assert served.post("/v1/chat/completions", b"[1]")[0] == 400
    assert served.post("/v1/chat/completions", b"[" * 50000)[0] == 400
    assert served.post("/v1/chat/completions", b"\xff\xfe")[0] == 400
    assert served.post("/v1/chat/completions", b" " * (1 << 17))[0] == 413
    assert served.post("/v1/chat/completions", b"{}", **{"Content-Length": str(10**12)})[0] == 413
    assert served.post("/v1/chat/completions", b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert served.post("/v1/completions", json.dumps({"model": "tiny", "prompt": "\ud800"}).encode())[0] == 400
    assert served.post("/v1/completions", json.dumps({"model": "tiny", "prompt": [10**9]}).encode())[0] == 400
    assert served.post("/v1/completions", b'{"model": "tiny", "prompt": "x", "temperature": NaN}')[0] == 400
    assert served.post("/nowhere", b"{}")[0] == 404
    assert served.get("/v1/completions")[0] == 405
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; available: tiny"):
        served.client.completions.create(model="other", prompt="x")


def test_what_is_sent_too_slowly_is_ended(served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as slow:
        slow.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(4096)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(served, stream) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 500, "stream": stream, "logit_bias": {}}).encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as gone:
        gone.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while not served.engine.scheduler.active:
            time.sleep(0.001)
        (job,) = served.engine.scheduler.active
    assert idle(served.engine)
    assert job.over
    assert len(job.ids) < 500, "it was not made to its end"


def test_models_and_health(served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"
    assert json.loads(served.get("/health")[1]) == {"status": "ok"}


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "grün"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def test_an_answer_fits_its_schema(served) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    answer = served.client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=form, n=4, seed=3, max_tokens=200, temperature=1.5
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert len({choice.message.content for choice in answer.choices}) > 1
    for wrong in (
        {"type": "objct"},
        {"$ref": "#/nowhere"},
        "x",
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "string", "pattern": "("},
        {"const": int("9" * 400)},
    ):
        form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": wrong}}
        with pytest.raises(openai.BadRequestError, match="response_format"):
            served.client.chat.completions.create(model="tiny", messages=HELLO, response_format=form)
    many = {str(i): {"type": "string", "pattern": "[a-z]{1,500}"} for i in range(1000)}
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": {"properties": many}}}
    refusals = []
    for seed in range(3):  # what is sampled decides whether an answer reaches the library's limits
        try:
            answer = served.client.chat.completions.create(
                model="tiny", messages=HELLO, response_format=form, seed=seed, temperature=1.5, max_tokens=100
            )
        except openai.BadRequestError as error:
            refusals.append(str(error))
        else:
            (choice,) = answer.choices
            assert choice.finish_reason == "length" or isinstance(
                json.loads(choice.message.content), dict | list | str | int | float | None
            )
    assert all("takes too much" in refusal for refusal in refusals)


TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\nAnswer with <tool_call> where one is of use.\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }} {{ c.function.arguments.city }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "what the weather will be",
        "parameters": {"type": "object", "properties": WEATHER, "required": [*WEATHER], "additionalProperties": False},
    },
}


@pytest.fixture(scope="module")
def tooled(recorded, tmp_path_factory) -> Iterator[Served]:
    """A server of the bundle with a chat template that knows tools."""
    built = recorded.copy(tmp_path_factory.mktemp("tooled"))
    info, config = (built.bundle / name for name in ("tokenizer_info.json", "tokenizer_config.json"))
    info.write_text(json.dumps({**json.loads(info.read_text()), "chat": {"format": "template"}}))
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    built.sign()
    engine = Engine(manifest.read(built.bundle))
    yield from serve(engine)
    engine.close()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [True, False])
def test_a_tool_is_called_that_has_to_be(tooled, choice, stream) -> None:
    pytest.importorskip("llguidance")
    request = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200, "seed": 1}
    if stream:
        chunks = [chunk.choices[0] for chunk in tooled.client.chat.completions.create(**request, stream=True)]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
        (call,) = chunks[-1].delta.tool_calls
        finish = chunks[-1].finish_reason
    else:
        choice = tooled.client.chat.completions.create(**request).choices[0]
        (call,), finish = choice.message.tool_calls, choice.finish_reason
        assert choice.message.content is None
    assert finish == "tool_calls"
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])


def test_with_tools_and_a_schema_an_answer_is_a_call_or_fits(tooled) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    request = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "response_format": form, "max_tokens": 200}
    wanted = requests.chat(request, tooled.engine)
    encode, stop = tooled.engine.tokenizer.encode, min(tooled.engine.tokenizer.stop)

    def fits(text: str) -> bool:
        mask = wanted.masks()
        for token in encode(text):
            if not mask.allowed()[token]:
                return False
            mask.accept(token)
        return bool(mask.allowed()[stop])

    assert fits('{"colour": "red", "count": 3}')
    assert fits('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>')
    assert not fits('{"colour": "blue", "count": 3}')
    assert not fits('<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>')
    assert not fits("Hello")
    for choice in tooled.client.chat.completions.create(**request, n=4, seed=1).choices:
        if choice.message.tool_calls:
            (call,) = choice.message.tool_calls
            jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])
        else:
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_a_call_and_its_result_reach_the_template(tooled) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    wanted = requests.chat({"model": "tiny", "messages": messages, "tools": [TOOL]}, tooled.engine)
    said = tooled.engine.tokenizer.decode(wanted.prompts[0])
    assert "weather Rome" in said
    assert "sunny" in said
    assert '"what the weather will be"' in said
    none = requests.chat({"model": "tiny", "messages": messages, "tools": [TOOL], "tool_choice": "none"}, tooled.engine)
    assert "will be" not in tooled.engine.tokenizer.decode(none.prompts[0])


def test_tools_that_cannot_be_called_are_refused(served, tooled) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        served.client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL])
    other = {"type": "function", "function": {"name": "other"}}
    with pytest.raises(openai.BadRequestError, match="names 'other'"):
        tooled.client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL], tool_choice=other)
    with pytest.raises(openai.BadRequestError, match="needs tools"):
        tooled.client.chat.completions.create(model="tiny", messages=HELLO, tool_choice="required")


HERMES, MISTRAL, BARE = STYLES["<tool_call>"], STYLES["[TOOL_CALLS]"], STYLES['"parameters"']


@pytest.mark.parametrize(
    ("style", "text", "said", "called"),
    [
        (
            HERMES,
            'Let me see. <tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call>',
            "Let me see. ",
            1,
        ),
        (HERMES, '<tool_call>{"name": "weather"}</tool_call><tool_call>{"name": "weather"}</tool_call>', "", 2),
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"a": 1}}', "", 1),
        (HERMES, "<tool_call>broken", "<tool_call>broken", 0),
        (HERMES, 'a <tool_call>{"name": "unknown"}</tool_call>', 'a <tool_call>{"name": "unknown"}</tool_call>', 0),
        (HERMES, "1 < 2 and <tool", "1 < 2 and <tool", 0),
        (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {}}, {"name": "weather"}]', "", 2),
        (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"a": 1}}]', "", 1),
        (BARE, '{"name": "weather", "parameters": {"a": 1}}', "", 1),
        (BARE, '{"name": "weather", "parameters": {}}; {"name": "weather", "parameters": {}}', "", 2),
        (BARE, "It is {not} one", "It is {not} one", 0),
        (BARE, '{"some": "json"}', '{"some": "json"}', 0),
    ],
)
def test_what_is_said_is_told_from_what_is_called(style, text, said, called) -> None:
    tools = Tools([TOOL], style, (), parallel=True)
    for step in (1, 3, len(text)):
        reader = Reader(tools)
        heard = "".join(reader.feed(text[at : at + step]) for at in range(0, len(text), step))
        rest, calls = reader.finish()
        assert (heard + rest, len(calls)) == (said, called)
        assert all(json.loads(call["function"]["arguments"]) in ({}, {"a": 1}) for call in calls)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_answers_at_once_are_those_alone(served, alone, count) -> None:
    answer_under_load(served, alone, count)


@pytest.mark.slow
def test_answers_at_once_are_those_alone_with_activations_of_int8(tmp_path_factory) -> None:
    built = bundles.build(tmp_path_factory.mktemp("int8"), "q4f32_1", activations="int8")
    bundle = manifest.read(built.bundle)
    assert bundle.model["activations"] == "int8"
    engine = Engine(bundle, tokens=1024)
    for served in serve(engine):
        answer_under_load(served, generating(bundle), 200)
    engine.close()


def answer_under_load(served, alone, count) -> None:
    """Joins, clients that leave, guesses, prompts that begin alike, and pages for a few of them only."""
    engine, rng = served.engine, random.Random(5)  # noqa: S311
    systems = [[rng.randrange(1, 200) for _ in range(length)] for length in (40, 70, 120)]
    wanted: dict[tuple[int, ...], str] = {}

    def ask(at: int, prompt: list[int]) -> None:
        request = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12, "stream": at % 2 == 0}
        answer = served.client.completions.create(**request, extra_body={"speculate": 4 * (at % 3 == 0)})
        if at % 2:
            said[at] = answer.choices[0].text
        elif at % 10:
            said[at] = "".join(chunk.choices[0].text for chunk in answer)
        else:  # this one leaves after its first word
            next(iter(answer))
            answer.close()

    said: dict[int, str] = {}
    before = engine.scheduler.cached_tokens
    prompts = [
        [*rng.choice(systems), *(rng.randrange(1, 200) for _ in range(rng.randrange(1, 60)))] for _ in range(count // 3)
    ]
    prompts = [rng.choice(prompts) for _ in range(count)]
    with ThreadPoolExecutor(12) as clients:
        list(clients.map(ask, range(count), prompts))
    assert idle(engine)
    assert len(said) == 0.9 * count
    for at, text in said.items():
        prompt = tuple(prompts[at])
        if prompt not in wanted:
            wanted[prompt] = alone(prompts[at], 12)
        assert text == wanted[prompt], at
    assert engine.scheduler.cached_tokens - before > 20 * count
    kept = engine.scheduler.prefixes
    while (oldest := kept.oldest()) is not None:
        engine.scheduler._forget(oldest)
    assert engine._session.free_pages == engine.pages, "pages that nobody knows of"


@pytest.mark.parametrize("source", ["the text", "a bundle"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_guessing_changes_nothing_that_is_said(recorded, served, source, temperature) -> None:
    """By the ids that came before, and by a second bundle: here the same one, whose guesses are right where greedy."""
    bundle = manifest.read(recorded.bundle)
    engine = Engine(bundle, tokens=1024, draft=None if source == "the text" else bundle)
    prompt = [*range(20, 50), *range(20, 44)]
    request = {"prompt": prompt, "max_tokens": 40, "temperature": temperature, "seed": 4, "logprobs": 0}
    plain = served.client.completions.create(model="tiny", **request, n=2)
    try:
        for there in serve(engine):
            answer = there.client.completions.create(model="tiny", **request, n=2, extra_body={"speculate": 4})
    finally:
        engine.close()
    assert [choice.text for choice in answer.choices] == [choice.text for choice in plain.choices]
    assert [choice.logprobs.tokens for choice in answer.choices] == [choice.logprobs.tokens for choice in plain.choices]
    usage = answer.usage.completion_tokens_details
    if source == "a bundle":
        assert usage.accepted_prediction_tokens > 20
        assert temperature or usage.rejected_prediction_tokens == 0
    assert engine.scheduler.steps < served.engine.scheduler.steps
    assert answer.usage.completion_tokens == plain.usage.completion_tokens


def test_look_up_guesses_what_followed_before() -> None:
    lookup = Lookup()
    assert list(lookup.propose([1, 2, 3, 4], 3)) == []
    assert list(lookup.propose([1, 2, 3, 4, 9, 2, 3], 2)) == [4, 9]
    assert list(lookup.propose([1, 2, 3, 4, 9, 2, 3, 5, 2, 3], 4)) == [5, 2, 3], "where it came last"
    assert list(lookup.propose([1, 2, 3, 4, 9, 2, 3, 5, 2, 3, 4], 1)) == [9], "the longer one counts"


def test_what_waits_beyond_the_queue_is_refused(recorded, monkeypatch) -> None:
    engine = Engine(manifest.read(recorded.bundle), queue=1, sequences=1)
    refused, step = threading.Event(), engine.scheduler.step
    monkeypatch.setattr(engine.scheduler, "step", lambda: (refused.wait(60), step())[1])

    def asked(there: Served, _: int) -> tuple[int, str | None]:
        try:
            answer = there.client.completions.with_raw_response.create(model="tiny", prompt="x", max_tokens=2)
        except openai.RateLimitError as error:
            refused.set()
            return error.status_code, error.response.headers["retry-after"]
        return answer.status_code, None

    for there in serve(engine):
        with ThreadPoolExecutor(4) as clients:
            found = list(clients.map(functools.partial(asked, there), range(4)))
        assert {*found} == {(200, None), (429, "1")}
    engine.close()


def test_an_answer_that_takes_too_long_is_ended(engine) -> None:
    for there in serve(engine, limits=apps.RequestLimits(seconds=0.001)):  # less than a token takes
        with pytest.raises(openai.APIStatusError, match="was not answered within") as raised:
            there.client.completions.create(model="tiny", prompt="x", max_tokens=500)
        assert raised.value.status_code == 504
        with pytest.raises(openai.APIError, match="was not answered within"):
            list(there.client.completions.create(model="tiny", prompt="x", max_tokens=500, stream=True))
        assert idle(engine)


def test_the_card_says_what_was_proven_of_this_bundle(served, certified, tmp_path) -> None:
    assert served.client.models.retrieve("tiny").proofs == {"verdict": "no certificate", "checks": []}
    found = card.proofs(manifest.read(certified[0]))
    assert found["verdict"] == "verified"
    assert {"name": "files", "ok": True} in [{key: check[key] for key in ("name", "ok")} for check in found["checks"]]
    assert all(check["ok"] and check["detail"] for check in found["checks"])
    copy = shutil.copytree(certified[0], tmp_path / "copy")
    other = dataclasses.replace(manifest.read(copy), sha256="0" * 64)
    assert card.proofs(other)["verdict"] == "the certificate beside it is of another bundle"
    held = (copy / "certificate.json").read_text()
    (copy / "certificate.json").write_text(held.replace('"ok": true', '"ok":true', 1))
    assert card.proofs(manifest.read(copy))["verdict"] == "its certificate is damaged"


def test_metrics_count_what_was_done(served) -> None:
    served.client.completions.create(model="tiny", prompt=TEXT, max_tokens=3, temperature=0)
    status, text = served.get("/metrics")
    assert status == 200
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(found['stagegraph_generated_tokens_total{model="tiny"}']) >= 2
    assert float(found['stagegraph_requests_total{model="tiny",outcome="done"}']) >= 1
    assert found['stagegraph_kv_pages{model="tiny"}'] == str(served.engine.pages)
    count = found['stagegraph_time_to_first_token_seconds_count{model="tiny"}']
    assert found['stagegraph_time_to_first_token_seconds_bucket{model="tiny",le="+Inf"}'] == count


def test_sigterm_lets_what_streams_end(recorded) -> None:
    """The command as it is run, with its key from the environment."""
    command = [sys.executable, "-m", "stages.runtime", "serve", str(recorded.bundle), "--port", "0", "--name", "mine"]
    environment = {**os.environ, "STAGEGRAPH_API_KEY": "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        first = process.stderr.readline()
        port = int(re.search(r"http://127.0.0.1:(\d+)/v1", first)[1])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
        stream = client.completions.create(model="mine", prompt="x", max_tokens=300, stream=True, logit_bias={})
        said = [next(stream)]
        process.send_signal(signal.SIGTERM)
        said += list(stream)
        assert said[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "set a key with --api-key-file"),  # noqa: S104
        (["--cache-tokens", "10"], "is smaller than one context"),
        (["--sequences", "99"], "built for 1 to 4"),
        (["--name", "a", "--name", "b"], "--name was given 2 times for 1 bundles"),
        (["--api-key-file", "nowhere"], "nowhere: No such file"),
        (["--port", "99999"], "--port 99999: expected 0 to 65535"),
        (["--timeout", "-5"], "--timeout -5: expected a number of at least 0"),
    ],
)
def test_what_cannot_be_served_is_said(recorded, options, said, monkeypatch) -> None:
    monkeypatch.delenv(command.KEY, raising=False)
    parser, err = argparse.ArgumentParser(), io.StringIO()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(recorded.bundle), "--port", "0", *options]), io.StringIO(), err) == 2
    assert said in err.getvalue()


def test_nothing_that_was_said_is_logged(served) -> None:
    served.client.completions.create(model="tiny", prompt="a secret", max_tokens=2)
    assert any("/v1/completions" in line and " 200 " in line for line in served.log)
    assert not any("secret" in line for line in served.log)


def test_another_name_of_this_machine_is_refused(served) -> None:
    status, said = served.get("/v1/models", Host="evil.example")
    assert status == 403
    assert "localhost only" in said
    assert "access-control-allow-origin" not in said.lower()


def test_the_key_is_needed_where_there_is_one(engine) -> None:
    for there in serve(engine, key="secret"):
        assert [model.id for model in there.client.models.list()] == ["tiny"]
        assert there.get("/health")[0] == 200
        assert there.get("/v1/models")[0] == 401
        assert there.get("/v1/models", Authorization="Bearer wrong")[0] == 401
        assert there.get("/v1/models", Authorization="Bearer secrets")[0] == 401


def test_who_reads_the_address_may_connect() -> None:
    import uvicorn

    with command._listening(uvicorn.Config("none:none", host="127.0.0.1", port=0)) as listener:
        socket.create_connection(listener.getsockname(), timeout=10).close()
