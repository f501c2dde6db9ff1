"""`serve` as clients see it: the official client, on a tiny bundle, over a real socket."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from stages.runtime import manifest
from stages.runtime.context import Context
from stages.runtime.generation import Generation
from stages.runtime.sampling import Sampler
from stages.runtime.session import Session
from stages.runtime.tokenizer import BundleTokenizer

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from stages.runtime.server import app as apps  # noqa: E402 - needs what may be absent
from stages.runtime.server.engine import Engine  # noqa: E402

TEXT = "The old lighthouse keeper walked"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HELLO = [{"role": "user", "content": "Hello there"}]


@dataclasses.dataclass
class Served:
    """A server of this process, its engine, and a client of it."""

    engine: Engine
    port: int
    client: openai.OpenAI
    log: list[str]

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


class Lines(list):
    def write(self, line: str) -> None:
        self.append(line)

    def flush(self) -> None:
        pass


def serve(engine: Engine, **options) -> Iterator[Served]:
    log = Lines()
    options = {"limits": apps.Limits(body=1 << 16, sending=2, seconds=120), "log": log, **options}
    config = uvicorn.Config(apps.create({"tiny": engine}, **options), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    port = listening.getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0, timeout=60)
    while not server.started:
        time.sleep(0.01)
    yield Served(engine, port, client, log)
    client.close()
    server.should_exit = True
    thread.join()


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
    """What `generate` continues a prompt's ids with, greedily."""
    bundle = manifest.read(recorded.bundle)
    session, tokenizer = Session(bundle), BundleTokenizer(bundle.folder)

    def text(ids: list[int], count: int) -> str:
        context = Context(session)
        pieces = Generation(ids, count).text(context, tokenizer, Sampler(tokenizer.active_vocab_size))
        found = "".join(pieces)
        context.close()
        return found

    return text


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


def idle(engine: Engine) -> bool:
    """Wait until nothing is being answered; False if that never happens."""
    for _ in range(2000):
        if not engine.scheduler.active and not engine.waiting:
            return True
        time.sleep(0.01)
    return False


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
    assert served.post("/v1/chat/completions", b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert served.post("/v1/completions", json.dumps({"model": "tiny", "prompt": "\ud800"}).encode())[0] == 400
    assert served.post("/v1/completions", json.dumps({"model": "tiny", "prompt": [10**9]}).encode())[0] == 400
    assert served.post("/v1/completions", b'{"model": "tiny", "prompt": "x", "temperature": NaN}')[0] == 400
    assert served.post("/nowhere", b"{}")[0] == 404
    assert served.get("/v1/completions")[0] == 405
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; there is: tiny"):
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
