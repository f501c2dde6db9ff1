"""The page of `serve` in a real browser: what is said, stopped, tried again, edited and kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from stages.runtime import manifest  # noqa: E402 - needs what may be absent
from stages.runtime.server.engine import Engine  # noqa: E402
from tests.support.local_server import Served, idle, serve  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


@pytest.fixture(scope="module")
def served(recorded) -> Iterator[Served]:
    engine = Engine(manifest.read(recorded.bundle))
    yield from serve(engine)
    engine.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served):
    """The page, which must not stumble nor ask for anything from elsewhere."""
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems: list[str] = []
    home = f"http://127.0.0.1:{served.port}/"
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith((home, "data:")) else problems.append(request.url)
    )
    page.goto(home)
    playwright.expect(page.locator("#model")).to_have_value("tiny")
    page.click("#settings-button")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "8")
    page.click("#settings-button")
    yield page
    assert problems == []
    context.close()


def ask(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    playwright.expect(page.locator("#send")).to_be_visible()


def texts(page) -> list[str]:
    return page.locator(".message .text").all_text_contents()


def test_an_answer_comes_and_is_kept_over_a_reload(page, served) -> None:
    ask(page, "Hello there")
    mine, answer = texts(page)
    assert mine == "Hello there"
    wanted = served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello there"}], temperature=0, max_tokens=8
    )
    assert answer == wanted.choices[0].message.content
    assert "8 tokens" in page.locator(".assistant .below").inner_text()
    page.reload()
    playwright.expect(page.locator(".message")).to_have_count(2)
    assert texts(page) == [mine, answer]
    assert page.input_value("#temperature") == "0"


def test_an_answer_is_tried_again_and_a_question_edited(page) -> None:
    ask(page, "One")
    ask(page, "Two")
    said = texts(page)
    page.get_by_role("button", name="Retry").click()
    playwright.expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert texts(page) == said, "greedy, so the same"
    page.get_by_role("button", name="Edit").first.click()
    assert texts(page) == []
    assert page.input_value("#text") == "One"


def test_an_answer_is_stopped_where_it_is(page, served, monkeypatch) -> None:
    step = served.engine.scheduler.step
    monkeypatch.setattr(served.engine.scheduler, "step", lambda: (time.sleep(0.05), step())[1])
    page.click("#settings-button")
    page.fill("#max_tokens", "")
    page.click("#settings-button")
    page.fill("#text", "Go on and on")
    page.click("#send")
    playwright.expect(page.locator("#status")).to_contain_text("tokens/s")
    page.click("#stop")
    playwright.expect(page.locator(".assistant .below")).to_contain_text("stopped")
    assert texts(page)[1]
    assert idle(served.engine)


def test_what_goes_wrong_is_said_and_can_be_mended(page) -> None:
    ask(page, "x" * 5000)
    assert "the context holds 512 tokens" in page.locator(".error").inner_text()
    page.get_by_role("button", name="Edit").click()
    ask(page, "Short")
    assert page.locator(".error").count() == 0
    assert texts(page)[0] == "Short"


def test_what_is_said_is_never_markup(page) -> None:
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    assert texts(page)[0] == "<img src=x onerror=alert(1)><b>bold</b>"
    assert page.locator("#messages b, #messages img").count() == 0


def test_it_can_be_used_by_keys_and_read_aloud(page) -> None:
    for control in page.locator("input, textarea, select, button").all():
        named = control.evaluate("e => (e.labels?.length || e.textContent.trim() || e.ariaLabel) ? '' : e.outerHTML")
        assert named == ""
    assert page.locator("[role=status]").count() == 1
    wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert not wide, "a phone must not scroll sideways"
