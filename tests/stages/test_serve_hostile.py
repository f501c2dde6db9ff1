"""What is slow, large, deep or wrong of what clients send to `serve`: each is told as the API does, nothing leaks."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from stages.runtime import manifest
from stages.runtime.server.engine import Engine
from tests.support.local_server import CONNECTIONS, SENDING, Served, idle, serve

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HELLO = [{"role": "user", "content": "Hello"}]
DEPTHS = (30, 49, 60, 900, 985, 995, 1500)  # some are read by Python and not written again


@pytest.fixture(scope="module")
def served(recorded) -> Iterator[Served]:
    engine = Engine(manifest.read(recorded.bundle), tokens=1024)
    yield from serve(engine)
    assert idle(engine)
    engine.close()


def refused(served: Served, body: bytes | dict, path: str = "/v1/chat/completions") -> int:
    """Send a body that is answered with an error of the API's form, and return the status."""
    data = body if isinstance(body, bytes) else json.dumps({"model": "tiny", "max_tokens": 2, **body}).encode()
    status, document = served.post(path, data)
    assert status != 500, document
    if status != 200:
        assert set(document["error"]) == {"message", "type", "param", "code"}
        assert len(document["error"]["message"]) < 1000
    return status


def raw(served: Served, data: bytes) -> tuple[int, dict]:
    """Send bytes and return the status and the document of what comes back before the connection is closed."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as there:
        there.sendall(data)
        return answer(there)


def answer(there: socket.socket) -> tuple[int, dict]:
    said = b""
    while part := there.recv(1 << 16):
        said += part
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        HEAD + b"Content-Length: minus one\r\n\r\n{}",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        HEAD + b"X: " + b"y" * (1 << 17),
        HEAD + b"X: y\r\n" * (1 << 14),
        b"POST /" + b"x" * (1 << 17),
    ],
    ids=["another protocol", "no length", "two lengths", "a long header", "many headers", "a long path"],
)
def test_a_head_that_is_none_is_told_in_the_api_form(served, data) -> None:
    status, document = raw(served, data)
    assert status == 400
    assert document["error"]["type"] == "invalid_request_error"


def test_a_head_that_does_not_come_is_not_waited_for(served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as slow:
        slow.sendall(HEAD)
        began = time.monotonic()
        while True:
            try:
                slow.sendall(b"X: y\r\n")
                if not slow.recv(1, socket.MSG_DONTWAIT):
                    break
            except BlockingIOError:
                time.sleep(0.05)
            except ConnectionError:
                break
        assert time.monotonic() - began > SENDING / 2


def test_who_does_not_read_is_left(served) -> None:
    # What fits into the buffers on the way has been sent, read or not, and how much fits is up to the machine:
    # so 12 MB are asked for on one connection.
    requests = 20
    asked = {"model": "tiny", "prompt": "x", "n": 6, "max_tokens": 150, "logprobs": 20, "stream": True}
    body = json.dumps({**asked, "logit_bias": dict.fromkeys(map(str, served.engine.tokenizer.stop), -100)}).encode()
    done = served.metrics("requests_total", outcome="done")
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", served.port))
        deaf.sendall((HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body) * requests)
        while served.metrics("requests_total", outcome="left") == 0:
            assert served.metrics("requests_total", outcome="done") < done + requests
            time.sleep(0.05)
    assert idle(served.engine)


def test_more_connections_than_there_may_be_are_refused(served) -> None:
    with ExitStack() as held:
        status, document = 200, {}
        while status == 200:  # what waited for too long, on a busy machine, is gone again
            for _ in range(CONNECTIONS):
                held.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            status, document = raw(served, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (status, document["error"]["type"]) == (503, "server_error")
    while served.get("/health")[0] != 200:
        time.sleep(0.01)


def nested(depth: int) -> str:
    return '{"type": "array", "items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize("depth", DEPTHS)
def test_deep_json_is_refused_or_read(served, depth) -> None:
    deep, hello = nested(depth), json.dumps(HELLO)
    schema = f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {deep}}}}}'
    tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]'
    for changes in (
        f'"response_format": {schema}',
        f'"chat_template_kwargs": {deep}',
        f'"messages": {deep}',
        f'"logit_bias": {deep}',
        f'"{"x" * 1000}": {deep}',
        f'"tools": {tools}',
    ):
        assert refused(served, f'{{"messages": {hello}, "max_tokens": 1, {changes}}}'.encode()) in (200, 400)
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": deep}}
    messages_of_calls = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert refused(served, {"messages": messages_of_calls}) in (200, 400)


LONE = "\ud800"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": LONE}]},
        {"messages": [{"role": LONE, "content": ""}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": LONE}]}]},
        {"messages": HELLO, "stop": LONE},
        {"messages": HELLO, "model": LONE},
        {"messages": HELLO, LONE: 1},
        {"messages": HELLO, "chat_template_kwargs": {"x": LONE}},
        {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": LONE}}}},
        {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": LONE}}}},
        {"messages": HELLO, "logit_bias": {LONE: 1}},
    ],
    ids=lambda body: "+".join(map(ascii, body)),
)
def test_text_that_is_none_is_refused(served, body) -> None:
    assert refused(served, body) in (200, 400, 404)
    written = json.dumps({"model": "tiny", **body}).replace("\\ud800", "\ud800")
    assert refused(served, written.encode("utf-8", "surrogatepass")) == 400


BOMBS = {
    "a pattern of patterns": {"type": "string", "pattern": "^((((a{1,99}){1,99}){1,99}){1,99}){1,99}$"},
    "many alternatives": {"anyOf": [{"const": f"{'x' * (at % 40)}{at}"} for at in range(1000)]},
    "alternatives of alternatives": {
        "$defs": {f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 4} for at in range(40)} | {"d40": {}},
        "$ref": "#/$defs/d0",
    },
    "all of alternatives": {"allOf": [{"anyOf": [{"minimum": a}, {"maximum": -a}]} for a in range(30)]},
    "itself": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "one in itself twice": {
        "$defs": {"a": {"type": "array", "prefixItems": [{"$ref": "#/$defs/a"}] * 2}},
        "$ref": "#/$defs/a",
    },
    "a long string": {"type": "string", "minLength": 10**8, "maxLength": 10**9},
    "many items": {"type": "array", "minItems": 10**8, "items": {"type": "integer"}},
    "many properties": {
        "properties": {f"p{at}": {"type": "integer"} for at in range(1000)},
        "required": [f"p{at}" for at in range(1000)],
    },
    "a multiple of a little": {"type": "number", "multipleOf": 1e-300, "minimum": -1e300, "maximum": 1e300},
    "elsewhere": {"$ref": "https://example.com/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_schema_cannot_hang_the_server(served, name) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "bomb", "schema": BOMBS[name]}}
    began = time.process_time()
    assert refused(served, {"messages": HELLO, "max_tokens": 30, "response_format": form}) in (200, 400)
    assert time.process_time() - began < 20, "of the processors, the answer included"


def test_every_token_may_be_biased(served) -> None:
    every = {str(token): 1 for token in range(served.engine.tokenizer.active_vocab_size)}
    assert refused(served, {"messages": HELLO, "logit_bias": every}) == 200
