"""The README and CONTRIBUTING run as they stand, the examples at toy size."""

import re
import subprocess
import sys

import pytest
import torch

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.paths import ROOT


def blocks(name, language):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_the_readme_s_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "lora r=8 alpha=16" in out
    assert (tmp_path / "my-delta" / "delta_model.safetensors").exists()


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


@pytest.mark.parametrize("name", ["plain_loop", "trainer", "trainer_resume", "accelerate_loop"])
def test_examples(name, toy, tmp_path):
    out = tmp_path / "delta"
    command = [
        sys.executable,
        str(ROOT / "examples" / f"{name}.py"),
        "--model",
        str(toy),
        "--examples",
        "40",
        "--epochs",
        "2" if name == "trainer_resume" else "1",
    ]
    run = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "fully trained" in run.stdout
    assert "loaded onto a fresh backbone, same predictions: True" in run.stdout
    assert (out / "delta_model.safetensors").stat().st_size < 20_000
    assert "trained the same values: False" not in run.stdout
    assert ("trained the same values: True" in run.stdout) is (name == "trainer_resume")


def test_the_sharded_example_on_two_processes(toy, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "examples" / "fsdp2.py"), "--model", str(toy), "--examples", "40", "--epochs", "1"]
    command = [*launch, *script, "--out", str(tmp_path / "delta")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "in one process" in run.stdout
    assert "fully trained" in run.stdout
    assert (tmp_path / "delta" / "delta_model.safetensors").stat().st_size < 20_000


def test_the_example_of_opendelta_s_tutorial(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "multitask_serving.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.endswith(
        "Correct Spelling: When was Beijing Olympic held?\n"
        "Question Topic: The question's topic is sports.\n"
        "Question Answer: 2008\n"
        "Correct Spelling: What was the common career of Newton and Einstein?\n"
        "Question Topic: The question's topic is science.\n"
        "Question Answer: Physicists\n"
    ), run.stdout
