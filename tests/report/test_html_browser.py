"""The report in a browser: it fits, sorts, can be read in the dark, asks for nothing and runs no foreign script.

Debian's chromium, driven by playwright: the tests are skipped where either is missing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hfcompress.report.html import render_html
from tests.report.contents import ATTACK, CUTS

NAMES = ("chromium", "chromium-browser", "google-chrome")
TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const isSeen = element.checkVisibility() && !element.closest("caption, .spoken");
    if (!walker.currentNode.textContent.trim() || !isSeen) continue;
    const style = getComputedStyle(element);
    const grounds = [];
    for (let each = element; each && !grounds.length; each = each.parentElement) {
      const { backgroundColor, backgroundImage } = getComputedStyle(each);
      if (!each.matches(".scroll")) grounds.push(...(backgroundImage.match(/rgba?\\([^)]*\\)/g) ?? []));
      grounds.push(backgroundColor);
      for (let n = grounds.length - 1; n >= 0; n--) if (/, 0\\)$/.test(grounds[n])) grounds.splice(n, 1);
    }
    const ink = element.closest("svg") ? style.fill : style.color;
    found.push({ text: walker.currentNode.textContent.trim(), ink, grounds, opacity: Number(style.opacity) });
  }
  return found;
}"""
"""Finds the visible texts with their colours and the colours behind them; bars of a map are gradients."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no browser here")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a report as a page; fails if it wrote to the console or asked for anything."""
    pages = []

    def show(content: dict[str, Any], width: int = 1200, scheme: str = "light") -> Any:
        (tmp_path / "report.html").write_text(render_html(content), encoding="utf-8")
        page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
        page.heard = []
        page.on("console", lambda message: page.heard.append(message.text))
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("dialog", lambda dialog: (page.heard.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.heard.append(request.url) if request.url[:5] != "file:" else None)
        page.goto((tmp_path / "report.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        pages.append(page)
        return page

    yield show
    for page in pages:
        assert page.heard == []
        page.context.close()


@pytest.fixture
def full(compared: dict[str, Any]) -> dict[str, Any]:
    """A report that has every part, and a name that is long and hostile."""
    return compared | {"cuts": {"01-distill": CUTS}}


def _contrast(one: str, other: str) -> float:
    """The contrast of two colours by WCAG 2: 1 to 21."""
    bright, dark = sorted(map(_luminance, (one, other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_contrast_of_black_and_white_is_that_of_the_standard() -> None:
    assert _contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert _contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_fits_the_window_and_every_text_can_be_read(
    show: Any, full: dict[str, Any], width: int, scheme: str
) -> None:
    page = show(full, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    dark = _luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1
    assert dark == (scheme == "dark")
    texts = page.evaluate(TEXTS)
    assert len(texts) > 200
    assert all(each["grounds"] for each in texts)
    pale = [
        (each["text"], each["ink"], ground)
        for each in texts
        for ground in each["grounds"]
        if each["opacity"] < 1 or _contrast(each["ink"], ground) < 4.5
    ]
    assert pale == []


def test_a_script_in_a_text_of_the_data_set_is_shown_and_does_not_run(show: Any, full: dict[str, Any]) -> None:
    page = show(full)
    assert ATTACK in page.locator("#changes td.text").first.inner_text()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2


def test_the_pages_own_policy_stops_a_script_and_a_request(show: Any, old: dict[str, Any]) -> None:
    page = show(old)
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "document.title = 'it ran'";
      const image = document.createElement("img");
      image.src = "http://127.0.0.1:9/x.png";
      document.body.append(script, image);
    }""")
    page.wait_for_function("document.images[0].complete")
    assert page.title() == "tiny: hfcompress report"
    assert sum("Content Security Policy" in each for each in page.heard) == 2
    page.heard.clear()


def test_a_heading_sorts_by_click_and_by_key(show: Any, old: dict[str, Any]) -> None:
    page = show(old)

    def models() -> list[str]:
        return [name.strip() for name in page.locator("#models tbody th").all_inner_texts()]

    heading = page.locator("#models thead th", has_text="MB").first
    heading.get_by_role("button").click()
    assert models() == ["02-quantize", "01-distill", "source"]
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert models() == ["source", "01-distill", "02-quantize"]
    assert heading.get_attribute("aria-sort") == "descending"
    page.locator("#models thead th").first.get_by_role("button").focus()
    page.keyboard.press("Space")
    assert models() == ["01-distill", "02-quantize", "source"]
    assert heading.get_attribute("aria-sort") == "none"


def test_a_screen_reader_is_told_what_each_table_and_column_is(show: Any, full: dict[str, Any]) -> None:
    page = show(full)
    captions = page.evaluate("[...document.querySelectorAll('table')].map((t) => t.caption?.textContent.trim())")
    assert len(captions) > 8
    assert all(captions)
    assert page.locator("thead th:not([scope=col]), tbody th:not([scope=row]), table:not(:has(thead))").count() == 0
    assert page.get_by_role("table", name="Latency by model and batch size").count() == 1
    wide = "(all) => all.filter((each) => each.scrollWidth > each.clientWidth + 1).length"
    assert page.locator(".scroll:not([tabindex])").evaluate_all(wide) == 0
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_a_points_figures_are_shown_to_pointer_and_keyboard(show: Any, old: dict[str, Any]) -> None:
    page = show(old, 400)
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator(".point").nth(1).hover()
    assert tip.inner_text().splitlines()[0] == "01-distill"
    assert "0.7600 (95% interval 0.7100 to 0.8100)" in tip.inner_text()
    page.locator(".point").nth(2).focus()
    assert "02-quantize" in tip.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_the_page_gives_back_its_report(show: Any, compared: dict[str, Any]) -> None:
    page = show(compared)
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "report.json"
    assert json.loads(Path(download.value.path()).read_text()) == compared
