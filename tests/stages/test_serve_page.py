"""The page of `serve` in a real browser: what is said, stopped, tried again, edited and kept."""

from __future__ import annotations

import json
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


def test_code_is_shown_as_such_and_stays_text(page) -> None:
    pieces = ["Like this:\n\n```py", "thon\nif a < b:\n    <b>x</b>\n```\nThat is", " all.", "\n```\nfor now"]
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    said = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=said, content_type="text/event-stream"))
    ask(page, "Show me")
    assert page.locator(".assistant pre").all_text_contents() == ["if a < b:\n    <b>x</b>", "for now"]
    assert texts(page)[1] == "Like this:\nif a < b:\n    <b>x</b>That is all.for now"
    assert page.locator("#messages b").count() == 0


def test_nothing_but_keys_is_needed(page, served, monkeypatch) -> None:
    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")

    def go_to(name: str, key: str = "Tab") -> None:
        for _ in range(30):
            if focused() == name:
                return
            page.keyboard.press(key)
        raise AssertionError(f"{name} is not reached by {key}")

    page.reload()
    playwright.expect(page.locator("#model")).to_have_value("tiny")
    assert focused() == "text", "one may write at once"
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert texts(page)[0] == "One\ntwo"
    go_to("Retry", "Shift+Tab")
    step = served.engine.scheduler.step
    monkeypatch.setattr(served.engine.scheduler, "step", lambda: (time.sleep(0.05), step())[1])
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#status")).to_contain_text("tokens")
    page.keyboard.press("Escape")
    playwright.expect(page.locator(".assistant .below")).to_contain_text("stopped")
    assert focused() == "text"
    go_to("Edit", "Shift+Tab")
    page.keyboard.press("Enter")
    assert (focused(), page.input_value("#text")) == ("text", "One\ntwo")
    go_to("settings-button", "Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert focused() == "system"


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .map((e) => {
      const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 100)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_everything_can_be_read_on_screens_of_any_kind(page, scheme, width) -> None:
    """Nothing is cut off or reaches beyond the side, and all text stands out as WCAG's level AA asks."""
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    ask(page, "one" + " and more" * 60)
    ask(page, "x" * 5000)
    page.click("#settings-button")
    page.click("#card summary")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 380) == (scheme == "dark")
    assert page.evaluate(CONTRAST) == []
    assert not page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    for element in ("#send", "#text", "#model", "#settings-button", "#new"):
        box = page.locator(element).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 800


def test_every_control_has_a_name_to_be_read_aloud(page) -> None:
    for control in page.locator("input, textarea, select, button").all():
        named = control.evaluate("e => (e.labels?.length || e.textContent.trim() || e.ariaLabel) ? '' : e.outerHTML")
        assert named == ""
    assert page.locator("[role=status]").count() == 1
