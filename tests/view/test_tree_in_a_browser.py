"""A tree in a real Chromium: light and dark pages on light and dark systems, and for colour-blind readers.

Skipped without Playwright (`pip install playwright`) or a Chromium.
"""

import base64
import shutil

import pytest

import deltakit as dk
from support.models import Transformer
from support.paths import ROOT

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# Slow: starting a browser takes seconds, and on a machine with much to do a minute.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

PAGES = {"light": ("#ffffff", "#1f1f1f"), "dark": ("#111111", "#e8e8e8")}
"""The background and the text of a page, which says nothing else about itself."""
PARTS = ("name", "folded", "type", "trainable", "frozen", "delta", "shape", "cells")
BLINDNESS = ("protanopia", "deuteranopia", "tritanopia", "achromatopsia")

# The greatest contrast (WCAG 2) between the ground of a picture, which is its most frequent colour, and its other colours.
CONTRAST = """
async (picture) => {
  const image = new Image();
  image.src = "data:image/png;base64," + picture;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, image.width, image.height).data, counts = new Map();
  for (let n = 0; n < data.length; n += 4) {
    const colour = data[n] * 65536 + data[n + 1] * 256 + data[n + 2];
    counts.set(colour, (counts.get(colour) || 0) + 1);
  }
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = (c) => 0.2126 * linear(c >> 16) + 0.7152 * linear((c >> 8) & 255) + 0.0722 * linear(c & 255) + 0.05;
  const ground = light([...counts].reduce((a, b) => (b[1] > a[1] ? b : a))[0]);
  return Math.max(...[...counts.keys()].map(light).map((text) => Math.max(text, ground) / Math.min(text, ground)));
}
"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


@pytest.fixture(scope="module")
def tree():
    model = Transformer()
    dk.attach(model, dk.LoRA(r=3), train="@head")
    off = dk.attach(model, dk.BitFit(at="@ff.down"), name="b")
    off.active = False
    return dk.show(model).html()


@pytest.fixture
def shown(browser, tree):
    """Returns a function that shows the tree on a page of a kind, on a system of a kind."""
    contexts = []

    def show(page, system="light", *, width=1000, html=tree, scripts=True):
        context = browser.new_context(
            color_scheme=system,
            viewport={"width": width, "height": 700},
            device_scale_factor=3,
            java_script_enabled=scripts,
        )
        contexts.append(context)
        context.set_default_timeout(120_000)
        opened = context.new_page()
        back, text = PAGES[page]
        opened.set_content(f'<!DOCTYPE html><meta charset="utf-8"><body style="background:{back};color:{text}">{html}')
        return opened

    yield show
    for context in contexts:
        context.close()


def contrasts(page, parts=PARTS):
    """The contrast of each part of a row as it is drawn: the greatest of its letters, in the row where it is least."""
    found = {}
    for part in parts:
        spans = page.locator(f".dk-row .dk-{part}:visible").all()
        pictures = [base64.b64encode(span.screenshot(animations="disabled")).decode() for span in spans[:4]]
        found[part] = min(page.evaluate(CONTRAST, picture) for picture in pictures)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_a_tree_is_that_of_its_page_whatever_the_system_is(page, shown):
    pictures = [shown(page, system).screenshot(animations="disabled") for system in PAGES]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) > 20_000


@pytest.mark.parametrize("page", PAGES)
def test_every_part_can_be_read(page, shown):
    opened = shown(page)
    found = contrasts(opened)
    for control in ("search", "expand all"):
        picture = opened.locator(f"button:has-text('{control}'),[placeholder='{control}']").screenshot()
        found[control] = opened.evaluate(CONTRAST, base64.b64encode(picture).decode())
    assert min(found.values()) > 4.5, found


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("page", PAGES)
def test_colour_blind_readers_can_read_it_and_see_the_deltas(page, blindness, shown):
    opened = shown(page)
    session = opened.context.new_cdp_session(opened)
    session.send("Emulation.setEmulatedVisionDeficiency", {"type": blindness})
    found = contrasts(opened, ("name", "type", "trainable", "frozen", "delta", "shape"))
    assert min(found.values()) > 4.5, found
    # Deltas need no colour: they are bold, and have a glyph.
    weights = {
        kind: opened.locator(f".dk-row:has(.dk-{kind})").first.evaluate("(row) => getComputedStyle(row).fontWeight")
        for kind in ("delta", "frozen")
    }
    assert weights == {"delta": "700", "frozen": "400"}
    assert "Δ" in opened.locator(".dk-row:has(.dk-delta)").first.inner_text()


@pytest.mark.parametrize("width", [1000, 400])
@pytest.mark.parametrize("scripts", [True, False])
def test_deltas_are_in_sight_and_columns_end_at_one_edge(width, scripts, shown):
    opened = shown("light", width=width, scripts=scripts)
    assert opened.locator(".dk-row .dk-delta").first.is_visible()
    rows = [row.bounding_box() for row in opened.locator(".dk-row:visible").all()]
    assert len({round(row["x"] + row["width"]) for row in rows}) == 1
    cells = [cell.bounding_box() for cell in opened.locator(".dk-row:visible .dk-cells").all()]
    assert max(cell["x"] + cell["width"] for cell in cells) <= width
    # Nothing is scrolled sideways: on a narrow page labels are cut.
    assert opened.locator("body").bounding_box()["width"] <= width
    assert max(row["x"] + row["width"] for row in rows) <= width


@pytest.mark.parametrize("system", PAGES)
def test_the_picture_in_the_readme_can_be_read(system, browser):
    with browser.new_context(color_scheme=system, device_scale_factor=3) as context:
        page = context.new_page()
        page.goto((ROOT / "examples" / "tree.svg").as_uri())
        found = {}
        for part in ("type", "frozen", "delta", "folded"):
            picture = page.locator(f"text.{part}").first.screenshot(timeout=120_000)
            found[part] = page.evaluate(CONTRAST, base64.b64encode(picture).decode())
        assert min(found.values()) > 4.5, found
        # It has a ground of its own, so the page of a code host may be of the other kind.
        ground = page.locator("rect").evaluate("(rect) => getComputedStyle(rect).fill")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[system]


def test_opening_searching_and_copying(shown):
    page = shown("dark")
    rows = page.locator(".dk-row:visible")
    first = rows.count()
    page.get_by_text("collapse").click()
    assert rows.count() < first
    page.get_by_text("expand all").click()
    everything = rows.count()
    assert everything >= first
    page.get_by_placeholder("search").fill("V_PROJ")
    assert 0 < rows.count() < everything
    assert page.get_by_text("v_proj").first.is_visible()
    page.get_by_placeholder("search").fill("")
    assert rows.count() == first
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.locator("[data-selector*=q_proj]").first.click()
    assert "layers.{0-1}.self_attn." in page.locator("output").inner_text()


def test_the_keyboard_opens_and_closes_rows(shown):
    page = shown("light")
    rows = page.locator(".dk-row:visible")
    first = rows.count()
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert rows.count() == 1
    page.keyboard.press("Enter")
    assert rows.count() == first
