"""The page at / in headless Chromium: drop, paste, choose, keyboard, phone, errors, key."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.apps.serve.small import base64_of, listening
from tests.tasks.small import plain

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("VLM_REQUIRE_BROWSER"),
    reason="this machine has no chromium on its PATH (Debian: apt-get install chromium); .ci/run requires it",
)
# A file as a browser hands it over when the user drops or pastes it.
HAND_OVER = """([kind, name, type, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  const more = kind === "paste" ? { clipboardData: data } : { dataTransfer: data };
  const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
  const place = document.querySelector(kind === "paste" ? "body" : "#drop");
  place.dispatchEvent(new Kind(kind, { bubbles: true, cancelable: true, ...more }));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("VLM_REQUIRE_BROWSER is set and no chromium is on the PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening() as url:
        yield url


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page, which must ask nobody but its own service and let no script fail."""
    page = browser.new_page()
    page.set_default_timeout(90_000)  # a machine that does other work is no failure
    asked: list[str] = []
    broken: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("console", lambda line: broken.append(line.text) if "Content Security" in line.text else None)
    page.goto(address)
    page.bring_to_front()  # keys and file choosers belong to the page in front
    yield page
    assert asked[0] == address + "/"
    assert [url for url in asked if not url.startswith((address + "/", "blob:" + address, "data:"))] == []
    assert broken == []
    page.close()


def bars(page: Page) -> list[tuple[str, str, float]]:
    """Label, percentage and length of each bar, once there are some."""
    page.wait_for_selector("#results li")
    rows = page.locator("#results li").all()
    return [
        (
            *row.locator("span").all_inner_texts(),
            row.locator("progress").evaluate("bar => bar.value / bar.max"),
        )
        for row in rows
    ]  # type: ignore[misc]


def red_first(page: Page) -> None:
    """Cosines with red are 1, 0.71 (yellow) and 0, times 10."""
    expect(page.locator("#results li")).to_have_count(3)
    expect(page.locator("#results li").first).to_contain_text("red")
    found = bars(page)
    assert [(label, share) for label, share, _ in found] == [("red", "94.9 %"), ("yellow", "5.1 %"), ("blue", "0.0 %")]
    assert [length for *_, length in found] == pytest.approx([0.9492, 0.0508, 0.00004], abs=1e-3)


def hand_over(page: Page, kind: str, name: str = "red.png", media: str = "image/png", content: str = "") -> None:
    page.evaluate(HAND_OVER, [kind, name, media, content or base64_of(plain("red", 40))])


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_a_picture_by_each_way(page: Page, way: str, tmp_path: Path) -> None:
    page.fill("#labels", "blue, red,\nyellow,")
    if way == "choose":
        plain("red", 40).save(tmp_path / "red.png")
        page.set_input_files("#file", tmp_path / "red.png")
    else:
        hand_over(page, way)
    red_first(page)
    assert page.locator("#preview").is_visible()
    assert page.locator("#preview").evaluate("image => image.naturalWidth") == 40
    assert page.locator("#spoken").inner_text() == "Most probable: red, 94.9 %"
    assert page.locator("#model").inner_text() == "Model: colours."
    assert page.locator("#message").inner_text() == ""
    # Other labels for the same picture.
    page.fill("#labels", "green, purple")
    page.click("#go")
    expect(page.locator("#results li").first).to_contain_text("purple")
    assert len(bars(page)) == 2


def test_with_the_keyboard_alone(page: Page, tmp_path: Path) -> None:
    plain("red", 40).save(tmp_path / "red.png")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    outline = page.locator("#drop").evaluate("place => getComputedStyle(place).outlineStyle")
    assert outline == "solid"  # the focus can be seen
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(tmp_path / "red.png")
    page.wait_for_selector("#results li")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "labels"
    page.keyboard.press("Control+a")
    page.keyboard.type("blue, red, yellow")
    page.keyboard.press("Enter")
    red_first(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "go"
    with page.expect_response("**/v1/classify"):
        page.keyboard.press("Space")


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone(browser: Browser, address: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(address)
    page.fill("#labels", f"blue, red, yellow, {'verylongword' * 12}")
    hand_over(page, "paste", content=base64_of(plain("red", 1500)))
    page.wait_for_selector("#results li")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#go").evaluate("button => button.getBoundingClientRect().height") >= 44
    page.tap("#go")
    assert page.locator("#labels").evaluate("box => parseFloat(getComputedStyle(box).fontSize)") >= 16  # no zoom
    context.close()


def test_what_is_wrong_is_said(page: Page) -> None:
    message = page.locator("#message")
    page.click("#go")
    assert message.inner_text() == "Choose a picture first."
    hand_over(page, "drop", name="notes.txt", media="text/plain", content="aGVsbG8=")
    assert message.inner_text() == "notes.txt is not a picture."
    hand_over(page, "drop")
    page.wait_for_selector("#results li")
    with page.expect_response("**/v1/classify"):
        hand_over(page, "drop", name="broken.png", content=base64.b64encode(b"\x89PNG\r\n\x1a\nnothing").decode())
    expect(message).to_contain_text("image 1")
    assert not page.locator("#found").is_visible() and not page.locator("#preview").is_visible()
    page.fill("#labels", " , ")
    page.click("#go")
    assert message.inner_text() == "Write at least one label."
    assert page.locator("#message").get_attribute("role") == "alert"


def test_labels_are_shown_as_text(page: Page) -> None:
    page.fill("#labels", "<img src=x onerror=alert(1)>, red")
    hand_over(page, "paste")
    page.wait_for_selector("#results li")
    assert page.locator("#results img").count() == 0
    assert "<img src=x onerror=alert(1)>" in page.locator("#results").inner_text()


def test_every_control_has_a_name(page: Page) -> None:
    names = page.evaluate("""[...document.querySelectorAll('input, textarea, button')].map(
      (one) => one.ariaLabel || (one.labels[0] || one).textContent.trim())""")
    assert all(names) and len(names) == 4


def test_a_service_with_a_key_asks_for_it(browser: Browser) -> None:
    with listening(api_key="secret-1") as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#key", state="visible")
        page.fill("#labels", "blue, red, yellow")
        hand_over(page, "paste")
        expect(page.locator("#message")).to_contain_text("needs a key")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("secret-1")
        page.keyboard.press("Enter")
        red_first(page)
        assert page.locator("#message").inner_text() == ""
        page.close()
