"""Checkpoints of prompt models in transformers' Trainer and in accelerate hold only what is trained."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import deltakit as dk
from deltakit.integrations import small_states
from deltakit.prompting import Ensemble, PromptModel, PrototypicalVerbalizer, Template, WordVerbalizer
from support.prompt_models import TOKENIZER_OF, WORDS, model_of, tokenizer_of
from support.prompt_training import DATA, SAVED, STEPS, prompt_model, trainer_of

KINDS = ("bert", "gpt2", "t5")


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def equal(model, other):
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_what_is_trained_and_resumes_exactly(kind, tmp_path):
    first = prompt_model(kind)
    trained = {name for name, one in first.named_parameters() if one.requires_grad}
    trainer_of(first, tmp_path).train()
    folder = tmp_path / f"checkpoint-{SAVED}"
    saved = load_file(folder / "model.safetensors")
    assert {name for name, value in saved.items() if value.is_floating_point() and value.numel()} == trained
    again = prompt_model(kind)
    trainer_of(again, tmp_path / "again").train(resume_from_checkpoint=str(folder))
    equal(again, first)


@pytest.mark.parametrize("kind", KINDS)
def test_load_reads_a_checkpoint(kind, tmp_path):
    model, tokenizer = prompt_model(kind), tokenizer_of(TOKENIZER_OF[kind])
    trainer_of(model, tmp_path).train()
    loaded = dk.load(tmp_path / f"checkpoint-{STEPS}", model_of(kind))
    other = PromptModel.from_delta(loaded, tokenizer)
    assert other.predict(DATA[:5]) == model.predict(DATA[:5])
    equal(other.verbalizer, model.verbalizer)


def test_the_best_checkpoint_is_loaded(tmp_path):
    losses, states = iter([1.0, 2.0]), []
    model = prompt_model()

    def metrics(_):
        states.append(copy.deepcopy(model.state_dict()))
        return {"own": next(losses)}

    best = {"load_best_model_at_end": True, "metric_for_best_model": "own", "greater_is_better": False}
    evaluating = {"eval_strategy": "steps", "eval_steps": SAVED, "save_total_limit": 1}
    trainer = trainer_of(model, tmp_path, compute_metrics=metrics, **best, **evaluating)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{SAVED}"
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in states[0].items())
    assert not all(torch.equal(found[name], value) for name, value in states[1].items())


_RESUME = """
import sys
import torch
from support.prompt_training import prompt_model, trainer_of
model = prompt_model("gpt2")
trainer_of(model, sys.argv[2]).train(resume_from_checkpoint=sys.argv[1])
torch.save(model.state_dict(), sys.argv[2] + "/state.pt")
"""


def test_another_process_resumes(tmp_path):
    # Its byte-level BPE is the same in each process. The trainer of WordPiece orders pieces at random.
    model = prompt_model("gpt2")
    trainer_of(model, tmp_path).train()
    paths = [str(tmp_path / f"checkpoint-{SAVED}"), str(tmp_path / "other")]
    tests = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{_RESUME}"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *paths], check=True, capture_output=True, env=one_thread
    )
    found, expected = torch.load(tmp_path / "other" / "state.pt"), model.state_dict()
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) == 0.0


def test_resuming_without_the_delta_names_it(tmp_path):
    trainer_of(prompt_model(), tmp_path).train()
    bare = trainer_of(prompt_model(attach=False), tmp_path / "bare")
    with pytest.raises(dk.CheckpointError, match="checkpoint-3: it holds what .*'delta'; none is attached; attach the"):
        bare.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))


def test_a_tuned_backbone_is_in_the_checkpoint(tmp_path):
    first = prompt_model(freeze=False)
    trainer_of(first, tmp_path).train()
    folder = tmp_path / f"checkpoint-{SAVED}"
    assert set(load_file(folder / "model.safetensors")) > set(first.state_dict())
    again = prompt_model(freeze=False)
    trainer_of(again, tmp_path / "again").train(resume_from_checkpoint=str(folder))
    equal(again, first)


def ensemble(*, shared):
    tokenizer, backbone = tokenizer_of("wordpiece"), model_of("bert")
    texts = ('{"placeholder": "text"} it was {"mask"}', '{"mask"} : {"placeholder": "text"}')
    models = []
    for number, text in enumerate(texts):
        own = backbone if shared else model_of("bert", seed=number)
        if not dk.deltas(own):
            dk.attach(own, dk.LoRA(r=3), name=f"lora{number}")
        verbalizer = PrototypicalVerbalizer(own, list(WORDS), size=5) if number else WordVerbalizer(tokenizer, WORDS)
        models.append(PromptModel(own, Template(text, tokenizer, own), verbalizer))
    return Ensemble(models)


@pytest.mark.parametrize("shared", [True, False])
def test_an_ensemble(shared, tmp_path):
    torch.manual_seed(0)
    first = ensemble(shared=shared)
    trainer_of(first, tmp_path).train()
    folder = tmp_path / f"checkpoint-{SAVED}"
    saved = load_file(folder / "model.safetensors")
    values = sum(p.numel() for p in first.parameters() if p.requires_grad)
    # A shared backbone stands at two places, and its delta in the checkpoint, too.
    assert sum(value.numel() for value in saved.values() if value.is_floating_point()) < 2.2 * values
    again = ensemble(shared=shared)
    trainer_of(again, tmp_path / "again").train(resume_from_checkpoint=str(folder))
    equal(again, first)
    part = folder if shared else folder / "members.1.backbone"
    assert dk.load(part, model_of("bert", seed=1 - shared)).name == ("lora0" if shared else "lora1")


def test_states_of_accelerate(tmp_path):
    def prepared():
        accelerator, model = small_states(Accelerator(cpu=True)), prompt_model()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        return accelerator, *accelerator.prepare(model, optimizer)

    def step(accelerator, model, optimizer):
        accelerator.backward(model.train()(**model.collate(DATA))["loss"])
        optimizer.step()
        optimizer.zero_grad()

    one = prepared()
    step(*one)
    one[0].save_state(tmp_path)
    step(*one)
    values = sum(p.numel() for p in one[1].parameters() if p.requires_grad)
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(value.numel() for value in saved.values() if value.is_floating_point()) == values
    two = prepared()
    two[0].load_state(tmp_path)
    step(*two)
    equal(two[1], one[1])
