"""A tree in a real Chromium: what can be read on light and dark pages, whatever the system is. Skipped where none is installed."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

import deltakit as dk
from support.models import Transformer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# Slow: starting a browser takes seconds, and on a machine with much to do a minute.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]

PAGES = (("#ffffff", "#1f1f1f"), ("#111111", "#e8e8e8"))
"""The background and the text of a light and of a dark page, which says nothing else about itself."""

# The least contrast (WCAG 2) of each part of a row, and where the columns end, after what a reader does.
LOOK = """
<script>
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function drawn(...colours) {
  for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function light(colour) {
  const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
}
function contrasts(box) {
  const found = {}, page = getComputedStyle(box).backgroundColor;
  for (const part of box.querySelectorAll(".dk-row span")) {
    const row = getComputedStyle(part.closest(".dk-row")).backgroundColor;
    const style = getComputedStyle(part), back = drawn(page, row), opacity = Number(style.opacity);
    const text = drawn(page, row, style.color).map((v, n) => v * opacity + back[n] * (1 - opacity));
    const pair = [light(text), light(back)];
    found[part.className] = Math.min(found[part.className] || 99, Math.max(...pair) / Math.min(...pair));
  }
  return found;
}
const [first, second] = document.querySelectorAll(".page");
const rows = () => [...first.querySelectorAll(".dk-row")].filter((row) => row.checkVisibility());
const edges = new Set(rows().map((row) => Math.round(row.getBoundingClientRect().right)));
const seen = { contrasts: [contrasts(first), contrasts(second)], edges: [...edges], rows: rows().length };
seen.scheme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const [all, none] = document.querySelectorAll(".dk-bar button"), search = document.querySelector(".dk-bar input");
none.click(); seen.collapsed = rows().length;
all.click(); seen.expanded = rows().length;
search.value = "V_PROJ"; search.dispatchEvent(new Event("input"));
seen.searched = rows().map((row) => row.querySelector(".dk-label").textContent.split(" ")[0]);
search.value = ""; search.dispatchEvent(new Event("input")); seen.cleared = rows().length;
Object.defineProperty(navigator, "clipboard", { value: { writeText: async (text) => { seen.copied = text; } } });
document.querySelector("[data-selector*=q_proj]").click();
const out = document.createElement("pre");
out.id = "seen"; out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>
"""


def seen(html, system, folder):
    boxes = (f'<div class="page" style="background:{back};color:{text}">{html}</div>' for back, text in PAGES)
    file = folder / "page.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8">{"".join(boxes)}{LOOK}', encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if system == 'dark' else 1}"
    own = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        scheme,
        "--dump-dom",
    ]
    run = subprocess.run([BROWSER, *own, file.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="seen">(.*?)</pre>', run.stdout, flags=re.S)
    assert found, run.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("system", ["light", "dark"])
def test_every_part_can_be_read_and_used(system, tmp_path):
    model = Transformer()
    dk.attach(model, dk.LoRA(r=3), train="@head")
    off = dk.attach(model, dk.BitFit(at="@ff.down"), name="b")
    off.active = False
    found = seen(dk.show(model).html(), system, tmp_path)
    assert found["scheme"] == system
    for contrasts in found["contrasts"]:
        assert {"dk-type", "dk-frozen", "dk-delta", "dk-shape", "dk-trainable", "dk-name"} <= contrasts.keys()
        assert min(contrasts.values()) > 4.5, contrasts
    # The columns end at one edge.
    assert len(found["edges"]) == 1
    assert found["collapsed"] < found["rows"] == found["cleared"] <= found["expanded"]
    assert "v_proj" in " ".join(found["searched"])
    assert len(found["searched"]) < found["rows"]
    assert found["copied"].startswith("layers.{0-1}.self_attn.")
