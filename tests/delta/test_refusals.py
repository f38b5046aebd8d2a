"""Arguments of the right type that make no sense: they are errors of ours, and change nothing."""

import warnings

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.delta.rebuilding import rebuilt
from support.forged_files import forge
from support.models import MLP, randomize


@pytest.fixture
def delta():
    return randomize(dk.attach(MLP(), dk.LoRA(r=2, at="*"), name="a"))


@pytest.mark.parametrize("option", ["params", "tag"])
def test_options_of_a_group_do_not_replace_its_parameters(delta, option):
    with pytest.raises(dk.OptionError, match=f"parameter_groups.up=.*'{option}'.*leave it out"):
        delta.parameter_groups(up={option: [], "lr": 0.1})


def test_a_sum_of_a_delta_of_another_model(delta):
    other = dk.attach(MLP(), dk.LoRA(r=2, at="*"), name="b")
    with pytest.raises(dk.OptionError, match="delta 'b' is a delta of another MLP"):
        dk.combine(delta.backbone, {delta: 1.0, other: 1.0})


def test_a_sum_that_overflows(delta):
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.fill_(1e10)
    with pytest.raises(dk.OptionError, match=r"combine: at up_proj .* infinite or not a number; use smaller weights"):
        dk.combine(delta.backbone, {"a": 1e38})


@pytest.mark.parametrize("number", [1e39, -1e300, 10**60])
@pytest.mark.parametrize("use", ["scale", "alpha", "weight"])
def test_numbers_that_float32_does_not_hold(delta, use, number):
    with pytest.raises(dk.OptionError, match="which float32 cannot hold$|which float32 cannot hold; omit"):
        if use == "scale":
            delta.scale = number
        elif use == "alpha":
            dk.LoRA(alpha=number)
        else:
            dk.combine(delta.backbone, {"a": number})
    delta.scale = 3.4e38


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to("meta"), "is on the meta device and has no values"),
        (lambda value: value.to_sparse(), "is sparse or nested; make it dense"),
        (lambda value: torch.nested.nested_tensor(list(value)), "is sparse or nested|the file has"),
    ],
)
def test_tensors_without_plain_values(delta, change, message):
    state = delta.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    name = next(iter(state))
    with pytest.raises(dk.CheckpointError, match=message):
        delta.load_state_dict({**state, name: change(state[name])})
    assert all(torch.equal(value, before[name]) for name, value in delta.state_dict().items())


def test_values_of_a_failed_training_do_not_blame_the_backbone(delta):
    state = delta.state_dict()
    with pytest.raises(dk.CheckpointError, match="infinite or not a number: .*; save them again from a run"):
        delta.load_state_dict({name: value * float("nan") for name, value in state.items()})


@pytest.mark.parametrize("made", [nn.ReLU(), "layer", nn.Linear(64, 32)])
def test_a_quantizer_that_returns_something_else(made):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    delta, weight = randomize(dk.attach(model, dk.LoRA(r=2, at="*"))), model[0].weight
    with pytest.raises(
        dk.TargetError, match=r"quantize= returned a (ReLU|str|Linear), and expected is a linear layer of size 64"
    ):
        delta.merge(quantize=lambda linear: made)
    assert model[0].weight is weight
    assert not delta.merged


def test_many_methods_in_a_short_file_are_refused_before_they_are_built(delta, tmp_path, monkeypatch):
    delta.save(tmp_path)
    delta.detach()
    forge(tmp_path, config=lambda config: config.update(methods=config["methods"] * 500))
    built = []
    monkeypatch.setattr("deltakit.delta.loading.rebuilt", lambda *args: built.append(args) or rebuilt(*args))
    with pytest.raises(dk.CheckpointError, match=r"up_proj\.lora_2\.A is missing"):
        dk.load(tmp_path, delta.backbone)
    assert len(built) == 2
