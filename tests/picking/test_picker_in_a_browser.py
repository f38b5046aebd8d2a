"""A picker in a real Chromium: on its page by the keyboard alone, and as the module of a notebook's widget."""

import json
import threading

import pytest
import torch
import transformers as tf

from deltakit.picking.browser import PickerServer
from deltakit.picking.picker import Picker, act, state_of, tree_of
from support.chromium import Chromium, needs_chromium
from support.tiny_transformers import build

# Slow: starting a browser takes seconds, and on a machine with much to do a minute.
pytestmark = [pytest.mark.slow, needs_chromium]

# The least contrast (WCAG 2) of the texts that are shown.
CONTRAST = """
(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const drawn = (...colours) => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    const light = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2] + 0.05;
  };
  const page = matchMedia("(prefers-color-scheme: dark)").matches ? "#121212" : "#ffffff";
  let least = 99;
  for (const part of document.querySelectorAll("label, code, p, h1, #said, .dk-head button")) {
    if (!part.checkVisibility()) continue;
    const line = part.closest(".dk-line");
    const back = [page, line ? getComputedStyle(line).backgroundColor : page];
    const pair = [drawn(...back, getComputedStyle(part).color), drawn(...back)];
    least = Math.min(least, Math.max(...pair) / Math.min(...pair));
  }
  return least;
})()
"""


def tab_to(page, wanted):
    for _ in range(100):
        page.press("Tab")
        if page.run(f"document.activeElement.matches({wanted!r})"):
            return
    raise AssertionError(f"the keyboard does not reach {wanted}")


@pytest.mark.parametrize("dark", [False, True])
def test_a_page_by_the_keyboard_alone(tmp_path, dark):
    picker = Picker(build("llama", tf.AutoModelForCausalLM))
    with PickerServer(picker) as server, Chromium(tmp_path / "profile", dark=dark) as page:
        page.open(server.url)
        page.wait("document.querySelectorAll('input[type=checkbox]').length > 10")
        tab_to(page, "input[type=search]")
        page.press(*"v_pr")
        page.wait("[...document.querySelectorAll('li')].filter((row) => row.checkVisibility()).length === 5")
        tab_to(page, "[title$=v_proj]")
        page.press(" ")
        page.wait("document.querySelector('.dk-result').textContent.includes('v_proj')")
        tab_to(page, "input[type=search]")
        page.run("document.activeElement.select()")
        page.press(*"layers.{0}/@attn.k")
        page.wait("document.querySelector('.dk-bar').textContent.includes('tick 1 matching module')")
        page.press("Tab", "Enter")
        page.wait("document.querySelector('[title$=k_proj]').indeterminate")
        assert "1 of 2" in page.run("document.querySelector('[title$=k_proj]').closest('.dk-line').textContent")
        page.wait("document.querySelector('.dk-result').textContent.includes('k_proj')")
        tab_to(page, "input[type=search]")
        page.press(*"zzz")
        page.wait("document.querySelector('.dk-head').textContent.includes('nothing matches')")
        page.run("document.querySelector('input[type=search]').value = ''")
        page.press(" ")
        page.wait("document.querySelectorAll('label')[0].checkVisibility()")
        tab_to(page, "[title$='self_attn.q_proj']")
        tab_to(page, ".dk-every")
        page.press("Enter")
        page.wait("document.querySelectorAll('.dk-ticked').length === 3")
        assert page.run(CONTRAST) > 4.5
        line = page.run("document.querySelector('.dk-result').textContent")
        assert line == picker.selection().line
        tab_to(page, "footer button")
        page.press("Enter")
        page.wait("document.getElementById('said').textContent.startsWith('Done.')")
        assert server.wait()
    assert {name.rpartition(".")[2] for name in picker.selection().names} == {"q_proj", "k_proj", "v_proj"}
    assert len(picker.selection().names) == 5


def test_closing_the_page_cancels_and_loading_it_again_does_not(tmp_path):
    picker = Picker(build("bert"))
    with PickerServer(picker) as server, Chromium(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait("document.querySelectorAll('input[type=checkbox]').length > 10")
        page.run("document.querySelectorAll('input[type=checkbox]')[1].click()")
        page.wait("document.querySelectorAll('.dk-ticked').length === 1")
        page.open(server.url)
        # The state is the program's, so it is as it was.
        page.wait("document.querySelectorAll('.dk-ticked').length === 1")
        assert not server.ended.is_set()
        waiting = threading.Thread(target=lambda: found.append(server.wait()))
        found = []
        waiting.start()
        page.close_page()
        waiting.join(60)
    assert found == [False]


def test_hostile_names_are_text(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    for name in ("<img src=x onerror=window['hit']=1>", "</script><script>window['hit']=1", "[bold]x"):
        model.add_module(name, torch.nn.Linear(3, 3))
    with PickerServer(Picker(model)) as server, Chromium(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait("document.querySelectorAll('input[type=checkbox]').length === 4")
        assert page.run("window.hit === undefined")
        assert page.run("document.querySelector('li:last-child label').textContent").startswith("[bold]x (Linear)")
        assert page.run("document.images.length") == 0


def test_the_widget_of_a_notebook(tmp_path):
    """Its module in a page with a stub of anywidget's model; messages and states go through Python as they do in Jupyter."""
    notebook = pytest.importorskip("deltakit.picking.notebook")
    picker = Picker(build("t5"))
    start = json.dumps({"tree": tree_of(picker), "state": state_of(picker)})
    module = json.dumps(notebook.ESM).replace("<", "\\u003c")
    (tmp_path / "page.html").write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><body><script type="module">
        const data = {start}, heard = {{}};
        window.sent = [];
        const model = {{
          get: (name) => data[name], send: (message) => window.sent.push(message),
          on: (name, act) => {{ heard[name] = act; }}, off: (name) => {{ delete heard[name]; }},
        }};
        window.change = (state) => {{ data.state = state; heard["change:state"](); }};
        const url = URL.createObjectURL(new Blob([{module}], {{ type: "text/javascript" }}));
        const widget = (await import(url)).default;
        window.end = widget.render({{ model, el: document.body }});
        window.heard = heard;
        </script>""",
        encoding="utf-8",
    )
    with Chromium(tmp_path / "profile") as page:
        page.open((tmp_path / "page.html").as_uri())
        page.wait("document.querySelectorAll('input[type=checkbox]').length > 10")
        page.run(
            "document.querySelector('[title$=\".SelfAttention.q\"]').closest('.dk-line').querySelector('.dk-every').click()"
        )
        (message,) = page.run("window.sent")
        assert message["do"] == "everywhere"
        act(picker, message)
        page.run(f"window.change({json.dumps(state_of(picker))})")
        assert page.run("document.querySelector('.dk-result').textContent") == 'dk.LoRA(at="q")'
        assert page.run("document.querySelectorAll('.dk-ticked').length") == 6
        page.run("window.end()")
        assert page.run("Object.keys(window.heard).length") == 0
