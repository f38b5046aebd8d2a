"""A tree in a real Chromium: light and dark pages on light and dark systems, and for colour-blind readers."""

import itertools
import json

import pytest

import deltakit as dk
from support.chromium import Chromium, needs_chromium
from support.models import Transformer
from support.paths import ROOT

# Slow: starting a browser takes seconds, and on a machine with much to do a minute.
pytestmark = [pytest.mark.slow, needs_chromium]

PAGES = {"light": ("#ffffff", "#1f1f1f"), "dark": ("#111111", "#e8e8e8")}
"""The background and the text of a page, which says nothing else about itself."""
PARTS = ("name", "folded", "type", "trainable", "frozen", "delta", "shape", "cells")
BLINDNESS = ("protanopia", "deuteranopia", "tritanopia", "achromatopsia")
ROWS = "[...document.querySelectorAll('.dk-row')].filter((row) => row.checkVisibility())"
BODY = "document.body.getBoundingClientRect()"

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
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def tree():
    model = Transformer()
    dk.attach(model, dk.LoRA(r=3), train="@head")
    off = dk.attach(model, dk.BitFit(at="@ff.down"), name="b")
    off.active = False
    return dk.show(model).html()


@pytest.fixture
def shown(browser, tree, tmp_path):
    """Returns a function that shows the tree on a page of a kind, on a system of a kind."""
    numbers = itertools.count()

    def show(page, system="light", *, width=1000, scripts=True, blindness="none"):
        back, text = PAGES[page]
        file = tmp_path / f"{next(numbers)}.html"
        start = f'<!DOCTYPE html><meta charset="utf-8"><body style="background:{back};color:{text}">'
        file.write_text(start + tree, encoding="utf-8")
        browser.emulate(system=system, blindness=blindness, scripts=scripts, size=(width, 700))
        browser.open(file.as_uri())
        return browser

    return show


def contrast(page, part):
    """The contrast of an element as it is drawn: the greatest of its letters."""
    return page.run(f"({CONTRAST})({json.dumps(page.picture(part))})")


def contrasts(page, parts=PARTS):
    """The contrast of each part of a row, in the row where it is least."""
    found = {}
    for part in parts:
        spans = f"{ROWS}.flatMap((row) => [...row.querySelectorAll('.dk-{part}')])"
        count = page.run(f"{spans}.length")
        assert count, part
        found[part] = min(contrast(page, f"{spans}[{number}]") for number in range(min(count, 4)))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_a_tree_is_that_of_its_page_whatever_the_system_is(page, shown):
    pictures = []
    for system in PAGES:
        opened = shown(page, system)
        assert opened.run(f"matchMedia('(prefers-color-scheme: {system})').matches")
        pictures.append(opened.picture())
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) > 25_000


@pytest.mark.parametrize("page", PAGES)
def test_every_part_can_be_read(page, shown):
    opened = shown(page)
    found = contrasts(opened)
    for control in ("input[type=search]", "button"):
        found[control] = contrast(opened, f"document.querySelector('.dk-bar {control}')")
    assert min(found.values()) > 4.5, found


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("page", PAGES)
def test_colour_blind_readers_can_read_it_and_see_the_deltas(page, blindness, shown):
    usual = shown(page).picture()
    opened = shown(page, blindness=blindness)
    assert opened.picture() != usual
    found = contrasts(opened, ("name", "type", "trainable", "frozen", "delta", "shape"))
    assert min(found.values()) > 4.5, found
    # Deltas need no colour: they are bold, and have a glyph.
    weights = {
        kind: opened.run(f"getComputedStyle(document.querySelector('.dk-row:has(.dk-{kind})')).fontWeight")
        for kind in ("delta", "frozen")
    }
    assert weights == {"delta": "700", "frozen": "400"}
    assert "Δ" in opened.run("document.querySelector('.dk-row:has(.dk-delta)').innerText")


@pytest.mark.parametrize("width", [1000, 400])
@pytest.mark.parametrize("scripts", [True, False])
def test_deltas_are_in_sight_and_columns_end_at_one_edge(width, scripts, shown):
    opened = shown("light", width=width, scripts=scripts)
    # The bar of buttons is made by the script.
    assert opened.run("document.querySelectorAll('.dk-bar').length") == int(scripts)
    assert opened.run("document.querySelector('.dk-row .dk-delta').checkVisibility()")
    rows = opened.run(f"{ROWS}.map((row) => row.getBoundingClientRect().right)")
    assert len({round(end) for end in rows}) == 1
    cells = f"{ROWS}.flatMap((row) => [...row.querySelectorAll('.dk-cells')])"
    ends = opened.run(f"{cells}.map((cell) => cell.getBoundingClientRect().right)")
    assert ends
    assert max(ends) <= width
    # Nothing is scrolled sideways: on a narrow page labels are cut.
    assert opened.run(f"{BODY}.width") <= width
    assert max(rows) <= width


@pytest.mark.parametrize("system", PAGES)
def test_the_picture_in_the_readme_can_be_read(system, browser):
    browser.emulate(system=system)
    browser.open((ROOT / "examples" / "tree.svg").as_uri())
    parts = ("type", "frozen", "delta", "folded")
    pictures = {part: browser.picture(f"document.querySelector('text.{part}')") for part in parts}
    # It has a ground of its own, so the page of a code host may be of the other kind.
    ground = browser.run("getComputedStyle(document.querySelector('rect')).fill")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[system]
    # A picture of its own has no document in which others can be drawn.
    browser.open("data:text/html,<p>")
    found = {part: browser.run(f"({CONTRAST})({json.dumps(picture)})") for part, picture in pictures.items()}
    assert min(found.values()) > 4.5, found


def test_opening_searching_and_copying(shown):
    page = shown("dark")
    count = f"{ROWS}.length"
    press = "[...document.querySelectorAll('.dk-bar button')].find((one) => one.textContent === {!r}).click()"
    search = "document.querySelector('[placeholder=search]').focus()"
    first = page.run(count)
    page.run(press.format("collapse"))
    assert page.run(count) < first
    page.run(press.format("expand all"))
    everything = page.run(count)
    assert everything >= first
    page.run(search)
    page.press(*"V_PROJ")
    page.wait(f"{count} < {everything}")
    assert page.run(count) > 0
    page.wait(f"{ROWS}.some((row) => row.textContent.includes('v_proj'))")
    page.press(*["Backspace"] * len("V_PROJ"))
    page.wait(f"{count} === {first}")
    page.run("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.run("document.querySelector('[data-selector*=q_proj]').click()")
    assert "layers.{0-1}.self_attn." in page.run("document.querySelector('output').innerText")


def test_the_keyboard_opens_and_closes_rows(shown):
    page = shown("light")
    first = page.run(f"{ROWS}.length")
    page.run("document.querySelector('summary').focus()")
    page.press("Enter")
    page.wait(f"{ROWS}.length === 1")
    page.press("Enter")
    page.wait(f"{ROWS}.length === {first}")
