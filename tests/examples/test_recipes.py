"""Every example runs as it stands, in an empty folder, and prints what its reader is to see."""

import ast
import runpy
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState

from support.paths import ROOT

EXAMPLES = ROOT / "examples"
FRESH = "loaded onto a fresh backbone, same predictions: True"
SHOWN = {
    "accelerate_loop": ["fully trained", FRESH],
    "all_linear": ["14 targets", "linear layers without a LoRA: ['lm_head']"],
    "continue_training": ["first day: loss", "second day: loss", "lora r=8"],
    "dpo": ["step  0: loss 0.6931, chosen above rejected 0%", "chosen above rejected 100%"],
    "encoder_only": ["encoder.block.{0-2}", "trained outside the encoder: []"],
    "first_delta": ["lora r=8 alpha=16", "Δ"],
    "merge_and_export": ["unmerged, exact: True", "the delta did change the outputs: True"],
    "mixed_batch": ["spelling", "None", "as alone: True"],
    "mixed_methods": ["MAM adapter", "parallel_adapter", "UniPELT"],
    "norms_only": ["ln_tuning", "norms alone: 448"],
    "own_module": ["mixers.{1-2}.{widen,narrow}", "after detach, the outputs of the untouched model: True"],
    "plain_loop": ["fully trained", "accuracy: 9", FRESH],
    "prompting": ["«[MASK]» . [SEP]", "of 6", FRESH],
    "qlora": ["Linear4bit", "lora r=8"],
    "ranks_by_layer": ["rank  4", "rank  8", "rank 16", "error: "],
    "switch_tasks": ["without a task, the bare model: True"],
    "to_and_from_peft": ["lora r=4 alpha=8", "read: largest difference", "written: largest difference"],
    "train_the_head": ["new in this BertForSequenceClassification and frozen", "same predictions: True"],
    "trainer": ["fully trained", "weights in checkpoint-", FRESH],
    "trainer_resume": ["resumed and uninterrupted run trained the same values: True"],
}
"""Some of what each example prints. `serving` has a file of its own, and the other two are below."""


# PEFT asks transformers' models for an attribute with an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SHOWN)
def test_a_recipe(name, tmp_path, monkeypatch, capsys):
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(True)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    AcceleratorState._reset_state(True)
    out = capsys.readouterr().out
    for text in SHOWN[name]:
        assert text in out, out
    # Where a recipe compares two things, they are the same.
    assert ": False" not in out, out


def test_every_recipe_is_run_and_stands_alone():
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert files.keys() == SHOWN.keys() | {"serving", "fsdp2", "multitask_serving"}
    for path in files.values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {name for name in names if name in files or str(name).startswith("deltakit.demo")}, path
    assert all(len(files[name].read_text(encoding="utf-8").splitlines()) <= 70 for name in SHOWN)


def test_every_recipe_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb"), *EXAMPLES.glob("guides/*.md")]:
        assert f"({path.relative_to(ROOT).as_posix()})" in readme, path


def test_the_sharded_example_on_two_processes(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(EXAMPLES / "fsdp2.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "accuracy in one process: 9" in run.stdout
    assert "fully trained" in run.stdout
    assert (tmp_path / "fsdp2-delta" / "delta_model.safetensors").stat().st_size < 30_000


def test_the_example_of_opendelta_s_tutorial(tmp_path):
    command = [sys.executable, str(EXAMPLES / "multitask_serving.py")]
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
