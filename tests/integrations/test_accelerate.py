"""accelerate's `save_state` and `load_state` with only what is trained."""

import copy

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from deltakit.integrations import small_states
from deltakit.integrations.inner_backbones import shrink
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(True)


def bert():
    return build("bert", tf.AutoModelForSequenceClassification)


def gpt2():
    return build("gpt2", tf.AutoModelForCausalLM)


def prepared(model, *, attach=True, lines=True, name=None):
    if attach:
        dk.attach(model, dk.LoRA(r=3), train="@head" if hasattr(model, "classifier") else None, name=name)
    accelerator = Accelerator(cpu=True)
    if lines:
        assert small_states(accelerator) is accelerator
    # All parameters, because without a delta none may require gradients.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return accelerator, *accelerator.prepare(model, optimizer)


def step(accelerator, model, optimizer):
    logits = model.train()(torch.tensor([[5, 6, 7]])).logits
    accelerator.backward(logits.square().mean())
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("safe", [True, False])
def test_a_run_goes_on_as_if_it_had_not_stopped(make, safe, tmp_path):
    accelerator, model, optimizer = prepared(make())
    step(accelerator, model, optimizer)
    accelerator.save_state(tmp_path, safe_serialization=safe)
    step(accelerator, model, optimizer)
    again, other, others = prepared(make())
    again.load_state(tmp_path)
    step(again, other, others)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    weights = tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")
    found = load_file(weights) if safe else torch.load(weights, weights_only=True)
    assert sum(value.numel() for value in found.values() if value.is_floating_point()) < 1500


def test_several_models_and_one_without_a_delta(tmp_path):
    accelerator, model, _ = prepared(bert())
    plain = accelerator.prepare(nn.Linear(3, 5))
    randomize(dk.deltas(model)[0])
    accelerator.save_state(tmp_path)
    again, other, _ = prepared(bert())
    bare = again.prepare(nn.Linear(3, 5))
    again.load_state(tmp_path)
    assert torch.equal(bare.weight, plain.weight)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_backbone_that_is_trained_too_is_saved(tmp_path):
    model = bert()
    delta = dk.attach(model, dk.LoRA(r=3), freeze=False)
    accelerator = small_states(Accelerator(cpu=True))
    model = accelerator.prepare(model)
    randomize(delta)
    accelerator.save_state(tmp_path)
    assert "bert.pooler.dense.weight" in load_file(tmp_path / "model.safetensors")


def test_loading_without_the_delta_fails(tmp_path):
    accelerator, *_ = prepared(bert(), name="topic")
    accelerator.save_state(tmp_path)
    with pytest.raises(
        dk.CheckpointError, match=r"model.safetensors: it holds what these .* 'topic'; none is attached; attach the"
    ):
        prepared(bert(), attach=False)[0].load_state(tmp_path)
    with pytest.raises(RuntimeError, match=r"torch.Size\(\[0\]\)"):
        prepared(bert(), attach=False, lines=False)[0].load_state(tmp_path)
    with pytest.raises(
        dk.OptionError, match="expected an accelerate.Accelerator, found a Linear; pass the accelerator"
    ):
        small_states(nn.Linear(2, 2))


class Module(nn.Module):
    """As a LightningModule holds models."""

    def __init__(self):
        super().__init__()
        self.model, self.own = Transformer(), nn.Linear(3, 5)


def test_a_lightning_checkpoint_is_small_and_loads_strictly():
    one = Module()
    other, without = copy.deepcopy(one), copy.deepcopy(one)
    for module in (one, other):
        dk.attach(module.model, dk.LoRA(r=2), name="topic", train="@head")
    randomize(dk.deltas(one)[0])
    state = one.state_dict()
    shrink(one, state)
    assert {"own.weight", "own.bias"} <= state.keys()
    assert sum(value.numel() for value in state.values() if value.is_floating_point()) < 600
    other.load_state_dict(state)
    assert torch.equal(one.model(ids()), other.model(ids()))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*model.deltakit: attach this delta first: topic"):
        without.load_state_dict(state)


@pytest.mark.parametrize("safe", [True, False])
def test_load_and_inspect_name_the_delta_of_a_state(safe, tmp_path):
    accelerator, model, _ = prepared(bert(), name="topic")
    accelerator.save_state(tmp_path, safe_serialization=safe)
    file = next(file for file in tmp_path.iterdir() if file.name.startswith(("model", "pytorch_model")))
    for place in (tmp_path, file):
        for read in (dk.inspect, lambda place: dk.load(place, bert())):
            with pytest.raises(
                dk.CheckpointError, match="training checkpoint of the delta 'topic'; attach it .*load_state"
            ):
                read(place)
    # The advice works.
    values = dk.deltas(model)[0].state_dict()
    again, other, _ = prepared(bert(), name="topic")
    again.load_state(tmp_path)
    folder = dk.deltas(other)[0].save(tmp_path / "delta")
    loaded = dk.load(folder, bert()).state_dict()
    torch.testing.assert_close(loaded, values, rtol=0, atol=0)
