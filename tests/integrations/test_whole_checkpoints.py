"""Checkpoints of a whole model, because more of it is trained than its deltas: they are compared when training resumes, too."""

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

import deltakit as dk
from deltakit.integrations import small_checkpoints, small_states
from deltakit.integrations.inner_backbones import shrink
from integrations.test_trainer import Tied, bert, equal, trainer_of
from support.models import Transformer, randomize
from support.tiny_transformers import build

MARK = "deltakit: attach these deltas first: a, b"


def attached(model, alphas=(16, 16), names="ab", **options):
    for alpha, name in zip(alphas, names, strict=True):
        randomize(dk.attach(model, dk.LoRA(r=3, alpha=alpha, **options), name=name, freeze=False))
    return model


def refused(load):
    """Calls a function with models that a checkpoint does not fit."""
    with pytest.raises(dk.CheckpointError, match="other options of the delta 'b': alpha was 16 and is 8; attach"):
        load(alphas=(16, 8))
    with pytest.raises(dk.CheckpointError, match="in the order a, b, and here in the order b, a; the states"):
        load(names="ba")
    with pytest.raises(dk.CheckpointError, match="'a', 'b'; the attached are 'a', 'c'; attach the same deltas"):
        load(names="ac")


def test_resuming_another_run_is_refused(tmp_path):
    def run(model, **options):
        trainer_of(model, tmp_path).train(**options)
        return model.state_dict()

    expected = run(attached(bert()))
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    resume = {"resume_from_checkpoint": str(file.parent)}
    saved = {name: value.clone() for name, value in load_file(file).items()}
    assert saved.keys() == {*attached(bert()).state_dict(), MARK}
    refused(lambda **options: run(attached(bert(), **options), **resume))
    equal(run(attached(bert()), **resume), expected)
    assert dk.inspect(file.parent / "a").name == "a"
    with pytest.raises(dk.CheckpointError, match="checkpoint-2: it holds what .*: 'a', 'b'; none is attached; attach"):
        small_checkpoints(trainer_of(bert(), tmp_path)).train(**resume)
    for text in (b"[", b"{}", b'{"a": {"place": 0}, "b": 1}'):
        save_file(saved | {MARK: torch.frombuffer(bytearray(text), dtype=torch.uint8)}, file, {"format": "pt"})
        with pytest.raises(
            dk.CheckpointError, match="what it says of the delta 'a.* is damaged; use another checkpoint"
        ):
            run(attached(bert()), **resume)
    # Those of earlier versions have no mark.
    save_file({name: value for name, value in saved.items() if name != MARK}, file, {"format": "pt"})
    run(attached(bert(), alphas=(8, 8)), **resume)


def test_the_state_dict_of_an_engine_gets_a_mark(tmp_path):
    model = attached(bert())
    model.save_pretrained(tmp_path / "checkpoint-1", state_dict=model.state_dict())
    assert MARK in load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    # Elsewhere the model is saved without its deltas.
    model.save_pretrained(tmp_path / "saved")
    assert MARK not in load_file(tmp_path / "saved" / "model.safetensors")
    assert MARK not in model.state_dict()


def test_a_model_whose_weights_are_converted(tmp_path):
    model = attached(build("mixtral", tf.AutoModelForCausalLM), names="ab")
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert MARK in load_file(tmp_path / "checkpoint-1" / "model.safetensors")


def test_a_plain_module(tmp_path):
    def model(**options):
        torch.manual_seed(3)
        return attached(Untied(), at="q_proj", **options)

    def run(one, **options):
        small_checkpoints(trainer_of(one, tmp_path, "gpt2")).train(**options)
        return one.state_dict()

    expected = run(model())
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    refused(lambda **options: run(model(**options), **resume))
    equal(run(model(), **resume), expected)
    assert dk.inspect(tmp_path / "checkpoint-4" / "a").name == "a"


class Untied(Tied):
    """The Trainer does not save tied weights of such modules."""

    def __init__(self):
        super().__init__()
        self.out.weight = nn.Parameter(self.out.weight.detach().clone())


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


def test_states_of_accelerate(accelerator, tmp_path):
    model = small_states(accelerator).prepare(attached(bert()))
    accelerator.save_state(tmp_path)
    assert MARK in load_file(tmp_path / "model.safetensors")

    def load(model=None, **options):
        accelerator.free_memory()
        found = accelerator.prepare(attached(bert(), **options) if model is None else model)
        accelerator.load_state(tmp_path)
        return found

    refused(load)
    equal(load().state_dict(), model.state_dict())
    with pytest.raises(dk.CheckpointError, match="'a', 'b'; none is attached; attach the same"):
        load(bert())


def test_a_wrapped_model_in_a_state_of_accelerate(accelerator, tmp_path):
    small_states(accelerator)
    (save,) = accelerator._save_model_state_pre_hook.values()
    (load,) = accelerator._load_model_state_pre_hook.values()
    wrapped = nn.DataParallel(attached(bert()))
    weights = [wrapped.state_dict()]
    save([wrapped], weights, str(tmp_path))
    assert f"module.{MARK}" in weights[0]
    save_file(weights[0], tmp_path / "model.safetensors")
    load([wrapped], str(tmp_path))
    with pytest.raises(dk.CheckpointError, match="model.safetensors: .*'a', 'b'; none is attached"):
        load([bert()], str(tmp_path))
    refused(lambda **options: nn.DataParallel(attached(bert(), **options)).load_state_dict(weights[0]))
    nn.DataParallel(attached(bert())).load_state_dict(weights[0])


class Module(nn.Module):
    """As a LightningModule holds models."""

    def __init__(self, **options):
        super().__init__()
        self.model = attached(Transformer(), **options)


def test_a_lightning_checkpoint():
    state = Module().state_dict()
    shrink(Module(), state)
    assert f"model.{MARK}" in state
    Module().load_state_dict(state)
    refused(lambda **options: Module(**options).load_state_dict(state))
