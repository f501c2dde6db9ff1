"""A bundle from Python: what `load` gives answers as `generate` does, alone and at once, sync and async."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.runtime import load
from stages.runtime.errors import BundleError, RequestError
from tests.support import bundles

HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def model(recorded):
    with load(recorded.bundle) as model:
        yield model


@pytest.fixture(scope="module")
def wanted(recorded) -> str:
    from stages.runtime import manifest
    from stages.runtime.session import Session
    from stages.runtime.tokenizer import BundleTokenizer

    bundle = manifest.read(recorded.bundle)
    tokenizer = BundleTokenizer(bundle.folder)
    return bundles.text_alone(Session(bundle), tokenizer, tokenizer.chat(HELLO), 10)


def test_it_answers_as_the_commands_do(model, wanted) -> None:
    reply = model.chat(HELLO, max_tokens=10, temperature=0)
    assert (reply.text, reply.finish, reply.generated_tokens) == (wanted, "length", 10)
    assert model.chat("Hello there", max_tokens=10, temperature=0).text == wanted
    stream = model.stream(HELLO, max_tokens=10, temperature=0)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == wanted == stream.reply.text
    assert stream.reply.cached_tokens > 0


def test_threads_and_tasks_ask_at_once(model, wanted) -> None:
    async def tasks() -> list[str]:
        replies = await asyncio.gather(*(model.chat_async(HELLO, max_tokens=10, temperature=0) for _ in range(5)))
        pieces = [piece async for piece in model.stream(HELLO, max_tokens=10, temperature=0)]
        return [*(reply.text for reply in replies), "".join(pieces)]

    assert asyncio.run(tasks()) == [wanted] * 6
    with ThreadPoolExecutor(5) as threads:
        assert [r.text for r in threads.map(lambda _: model.chat(HELLO, max_tokens=10, temperature=0), range(5))] == [
            wanted
        ] * 5


def test_a_stream_that_is_left_is_called_off(model) -> None:
    for _ in model.stream(HELLO):
        break
    assert model.chat(HELLO, max_tokens=2).generated_tokens == 2
    while model._engine.scheduler.active:
        pass


def test_mistakes_are_said(model, tmp_path) -> None:
    with pytest.raises(RequestError, match="context holds 512"):
        model.chat("x" * 5000)
    with pytest.raises(RequestError, match="temperature -1"):
        model.complete("x", temperature=-1)
    with pytest.raises(RequestError, match="stop a list"):
        model.complete("x", stop="x")
    with pytest.raises(BundleError, match=r"no bundle\.json there"):
        load(tmp_path)


def test_a_reply_fits_its_schema(model) -> None:
    pytest.importorskip("llguidance")
    assert model.chat(HELLO, schema={"enum": ["yes", "no"]}).text in ('"yes"', '"no"')


def test_the_package_itself_loads_nothing() -> None:
    code = "import stages.runtime, sys; assert not {'numpy', 'tvm', 'asyncio'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
