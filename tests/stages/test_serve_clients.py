"""Other clients of the OpenAI API than OpenAI's own, each as its users use it; skipped where one is not installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from stages.runtime import manifest
from stages.runtime.server.engine import Engine
from tests.support.local_server import Served, serve

TEXT = "Hello there"


@pytest.fixture(scope="module")
def served(recorded) -> Iterator[Served]:
    engine = Engine(manifest.read(recorded.bundle), tokens=1024)
    yield from serve(engine)
    engine.close()


@pytest.fixture(scope="module")
def wanted(served) -> str:
    request = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "temperature": 0, "max_tokens": 8}
    return served.client.chat.completions.create(**request).choices[0].message.content


def test_litellm(served, wanted) -> None:
    litellm = pytest.importorskip("litellm")
    there = {"api_base": f"http://127.0.0.1:{served.port}/v1", "api_key": "secret", "model": "openai/tiny"}
    request = {**there, "messages": [{"role": "user", "content": TEXT}], "temperature": 0, "max_tokens": 8}
    assert litellm.completion(**request).choices[0].message.content == wanted
    chunks = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**request, stream=True)]
    assert "".join(chunks) == wanted
    found = litellm.completion(**request, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert len(found["content"]) == 8
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["red", "green"]}}}
    assert litellm.completion(**request, response_format=form).choices[0].message.content in ('"red"', '"green"')


def test_langchain(served, wanted) -> None:
    chats = pytest.importorskip("langchain_openai")
    there = {"base_url": f"http://127.0.0.1:{served.port}/v1", "api_key": "secret", "model": "tiny", "temperature": 0}
    model = chats.ChatOpenAI(**there, max_tokens=8)
    assert model.invoke(TEXT).content == wanted
    assert "".join(str(chunk.content) for chunk in model.stream(TEXT)) == wanted
    said = model.bind(logprobs=True, top_logprobs=2).invoke(TEXT)
    assert len(said.response_metadata["logprobs"]["content"]) == 8
    schema = {"title": "thing", "type": "object", "properties": {"a": {"enum": ["red", "green"]}}, "required": ["a"]}
    longer = chats.ChatOpenAI(**there, max_tokens=60)
    found = longer.with_structured_output({**schema, "additionalProperties": False}, method="json_schema").invoke(TEXT)
    assert found["a"] in ("red", "green")


def test_llm(served, wanted, tmp_path, monkeypatch) -> None:
    models = pytest.importorskip("llm.default_plugins.openai_models")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    model = models.Chat("mine", model_name="tiny", api_base=f"http://127.0.0.1:{served.port}/v1", key="secret")
    assert model.prompt(TEXT, stream=False, temperature=0, max_tokens=8).text() == wanted
    assert "".join(model.prompt(TEXT, temperature=0, max_tokens=8)) == wanted
