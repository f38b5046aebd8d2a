"""The picker in the terminal, by textual's headless driver: keys, the filter and the preview."""

import asyncio

import pytest
import torch
import transformers as tf

pytest.importorskip("textual")

from deltakit.picking.picker import Picker
from deltakit.picking.terminal import PickerApp
from support.tiny_transformers import build


def run(picker, *keys):
    """What the program returns after these keys, and what was on its screen before the last."""
    screen = []

    async def use():
        app = PickerApp(picker)
        async with app.run_test(size=(80, 30)) as pilot:
            for number, key in enumerate(keys):
                await pilot.pause()
                if number == len(keys) - 1:
                    lines = app.screen._compositor.render_strips()
                    screen.append("\n".join("".join(piece.text for piece in line) for line in lines))
                await pilot.press(key)
        return app.return_value

    return asyncio.run(use()), screen[-1]


@pytest.fixture(scope="module")
def llama():
    return build("llama", tf.AutoModelForCausalLM)


def test_ticking_and_submitting(llama):
    picker = Picker(llama)
    keys = ["slash", *"q_proj", "enter", *["down"] * 5, "space"]
    result, screen = run(picker, *keys, "ctrl+s")
    assert result is True
    assert picker.selection().names == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    assert "[x] q_proj (Linear)" in screen
    assert "[ ] self_attn (LlamaAttention)" in screen
    assert "v_proj" not in screen
    assert 'dk.LoRA(at="q_proj")' in screen
    # The keys fit into 80 columns.
    assert "^s done" in screen
    assert "esc cancel" in screen


def test_only_the_labels_that_change_are_written_again(llama, monkeypatch):
    written = []
    label = PickerApp._label

    def noted(app, number):
        written.append(number)
        return label(app, number)

    picker = Picker(llama)
    monkeypatch.setattr(PickerApp, "_label", noted)
    run(picker, "down", "space", "ctrl+s")
    assert len(written) == len(picker.rows) + 1


def test_same_name_everywhere_matches_and_clearing(llama):
    picker = Picker(build("t5"))
    result, screen = run(picker, "slash", *"ion.q", "enter", *["down"] * 6, "e", "ctrl+s")
    assert result is True
    assert picker.selection().selectors == ("q",)
    picker = Picker(llama)
    run(picker, "slash", *"@attn.k", "enter", "a", "ctrl+s")
    assert picker.selection().selectors == ("k_proj",)
    picker.clear()
    screen = run(picker, "slash", *"{0}/q_proj", "enter", "a", "ctrl+s")[1]
    assert "[-] q_proj (Linear) weight:[32, 24]  ×2  1 of 2" in screen
    assert picker.selection().names == ("model.layers.0.self_attn.q_proj",)
    result, screen = run(picker, "c", "ctrl+s")
    assert result is True
    assert not picker.ticked
    assert "nothing is ticked yet" in screen


@pytest.mark.parametrize("keys", [["escape"], ["ctrl+c"], ["ctrl+q"], ["slash", "q", "escape", "escape"]])
def test_cancelling(llama, keys):
    picker = Picker(llama)
    picker.tick(1)
    assert not run(picker, *keys)[0]


def test_opening_and_closing(llama):
    picker = Picker(llama)
    closed = run(picker, "down", "left", "ctrl+s")[1]
    assert "LlamaDecoderLayer" in run(picker, "down", "ctrl+s")[1]
    assert "LlamaModel" in closed
    assert "LlamaDecoderLayer" in run(picker, "down", "down", "left", "right", "ctrl+s")[1]


def test_names_are_never_markup():
    model = torch.nn.Sequential()
    for name in ("[bold]x", "[/]", "\x1b[2J"):
        model.add_module(name, torch.nn.Linear(2, 3))
    picker = Picker(model)
    _, screen = run(picker, "down", "space", "ctrl+s")
    assert "[ ] [bold]x (Linear)" in screen or "[x] [bold]x (Linear)" in screen
    assert "\\x1b[2J" in screen
    assert len(picker.ticked) == 1
