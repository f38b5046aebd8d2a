"""`deltakit pick`: a line to paste on the standard output, and nothing else."""

import json

import pytest
import transformers

import deltakit as dk
from deltakit.cli import main
from deltakit.picking import front_ends
from support.tiny_transformers import build


@pytest.fixture
def llama(tmp_path):
    config = build("llama").config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


@pytest.fixture
def user(monkeypatch):
    """Ticks the rows whose numbers are in the list."""
    numbers = []

    def show(place, picker, port):
        for number in numbers:
            picker.tick(number)
        return True

    monkeypatch.setattr(front_ends, "_submitted", show)
    return numbers


def test_pick(llama, user, capsys):
    user += [5, 7]
    assert main(["pick", llama, "--how", "browser"]) == 0
    assert capsys.readouterr() == ('dk.LoRA(at="@attn.{q,v}")\n', "")
    assert main(["pick", llama, "--port", "8123", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["selectors"] == ["@attn.{q,v}"]
    assert found["line"] == 'dk.LoRA(at="@attn.{q,v}")'
    # They are those of the model that the user has, with its head.
    model = build("llama", auto=transformers.AutoModelForCausalLM)
    assert found["names"] == list(dk.select(model, found["selectors"]))


def test_nothing_picked(llama, user, capsys):
    assert main(["pick", llama, "--how", "browser"]) == 1
    assert capsys.readouterr() == ("", "deltakit: nothing was picked\n")


def test_what_cannot_be_picked(llama, user, capsys, monkeypatch):
    monkeypatch.setattr(front_ends, "_has_terminal", lambda: False)
    monkeypatch.setattr(front_ends, "_has_browser", lambda: False)
    assert main(["pick", llama]) == 1
    assert "neither a notebook, nor a terminal, nor a web browser is here" in capsys.readouterr().err
    assert main(["pick", "not/there/at all"]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["pick", llama, "--how", "notebook"]) == 2
    assert main(["pick", llama, "--port", "70000"]) == 2
    assert main(["pick", llama, "--how", "terminal", "--port", "3"]) == 2
