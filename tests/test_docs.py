"""The README and CONTRIBUTING run as they stand; the examples and guides are in `tests/examples`."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.paths import ROOT
from support.tiny_transformers import build


def blocks(name, language):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_the_readme_s_six_lines_run(tmp_path, monkeypatch, capsys):
    """With a model of the same kind in the place of the one on the Hub, and a step of training where the reader has a loop."""
    monkeypatch.chdir(tmp_path)
    build("qwen3", AutoModelForCausalLM).save_pretrained("tiny")
    (block,) = blocks("README.md", "python")
    step = "model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward(); optimizer.step()"
    code, found = re.subn(r"^\.\.\.  # your .*$", step, block, flags=re.M)
    assert found == 1
    assert block.count("dk.") == 2
    names = {}
    exec(compile(code.replace('"Qwen/Qwen3-0.6B"', '"tiny"'), "README.md", "exec"), names)
    assert "lora r=8 alpha=16" in capsys.readouterr().out
    fresh = AutoModelForCausalLM.from_pretrained("tiny")
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in names["model"].state_dict().items())
    assert dk.load("my-delta", fresh).num_parameters == names["delta"].num_parameters


def test_the_method_that_contributing_writes_works(tmp_path):
    (block,) = blocks("CONTRIBUTING.md", "python")
    names = {"__name__": "scale"}
    try:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
        model = Transformer().eval()
        before = model(ids())
        delta = dk.attach(model, names["Scale"]())
        assert torch.equal(model(ids()), before)
        randomize(delta)
        fresh = Transformer().eval()
        fresh.load_state_dict(dk.base_state_dict(model))
        dk.load(delta.save(tmp_path), fresh)
        assert torch.equal(fresh(ids()), model(ids()))
    finally:
        dk.METHODS.pop("scale", None)


def test_the_whole_method_in_contributing_is_the_file():
    (block,) = blocks("CONTRIBUTING.md", "py")
    assert block == (ROOT / "deltakit" / "methods" / "ia3.py").read_text(encoding="utf-8")


def test_ci_runs_the_readme_s_command():
    (_, test) = blocks("README.md", "sh")
    assert test.strip().endswith(".venv/bin/python -m pytest -n auto --dist worksteal")
    assert "<!-- test -->\n```sh\n" + test in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.slow
def test_api_pages(tmp_path):
    """The command in `examples/guides/api.md` makes pages of the docstrings."""
    pytest.importorskip("pdoc")
    (command,) = (block for block in blocks("examples/guides/api.md", "bash"))
    _, _, made = command.strip().partition(".venv/bin/pdoc ")
    options = made.replace("build/api", str(tmp_path)).split()
    run = subprocess.run(
        [sys.executable, "-m", "pdoc", *options], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-2000:]
    page = (tmp_path / "deltakit.html").read_text(encoding="utf-8")
    for name in dk.__all__:
        assert f'id="{name}"' in page, name
    # The options that all methods have are explained with each.
    assert page.count("selectors of what is left out of these targets") >= len(dk.METHODS)
    assert (tmp_path / "deltakit" / "integrations.html").exists()
