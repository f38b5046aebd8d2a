"""Backbones without a default position: the selector that the error names works."""

import re

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import randomize


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 8)

    def forward(self, x):
        return self.rnn(x)[0]


class Bare(nn.Module):
    """One parameter and no layer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x @ self.w


def advised(model, method):
    """The selector that the error of `method` without `at=` names."""
    with pytest.raises(dk.RoleError, match=f"{method.name}: no default position: ") as caught:
        dk.plan(model, method)
    found = re.search(r"such as at='([^']+)'; it can serve \S", str(caught.value))
    assert found, str(caught.value)
    return found[1]


ALONE = {
    "LSTM": (Recurrent, (5, 2, 8), "rnn.{weight_ih_l0,weight_hh_l0}"),
    "the LSTM itself": (lambda: nn.LSTM(8, 8), (5, 2, 8), "{weight_ih_l0,weight_hh_l0}"),
    "cell": (lambda: nn.GRUCell(8, 8), (2, 8), "{weight_ih,weight_hh}"),
    "parameter": (Bare, (2, 6), "w"),
    "linear": (lambda: nn.Linear(6, 4), (2, 6), "^"),
    "convolution": (lambda: nn.Conv2d(3, 8, 3), (2, 3, 7, 7), "^"),
    "last layer": (lambda: nn.Sequential(nn.Linear(6, 4)), (2, 6), "0"),
    "embedding": (lambda: nn.ModuleList([nn.Embedding(5, 4)]), None, "0"),
}
NEVER = {("LSTM", "ia3"), ("LSTM", "adapter"), ("the LSTM itself", "ia3"), ("the LSTM itself", "adapter")}
NEVER |= {("cell", "ia3"), ("cell", "adapter"), ("parameter", "ia3"), ("parameter", "adapter"), ("parameter", "bitfit")}


@pytest.mark.parametrize("method", [dk.LoRA, dk.BitFit, dk.IA3, dk.Adapter], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ALONE)
def test_the_selector_that_the_error_names_works(name, method):
    make, shape, selector = ALONE[name]
    model, options = make(), {"lora": {"r": 2}, "adapter": {"size": 2}}.get(method.name, {})
    if (name, method.name) in NEVER:
        with pytest.raises(dk.RoleError, match=r"cannot serve any of its layers and parameters; use another method"):
            dk.plan(model, method(**options))
        return
    assert advised(model, method(**options)) == selector
    delta = randomize(dk.attach(model, method(**options, at=selector)))
    if shape is not None:
        output = model(torch.randn(shape))
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        assert all(parameter.grad is not None for parameter in delta.parameters())


def test_a_container_with_nothing_but_parameters_names_them():
    for method in (dk.LoRA(r=2, at="rnn"), dk.BitFit(at="rnn")):
        with pytest.raises(
            dk.TargetError, match=r"rnn: .* LSTM has no linear layer or convolution in it .* such as at="
        ):
            dk.plan(Recurrent(), method)


def test_a_container_with_other_layers_names_them():
    model = nn.ModuleList([nn.ModuleList([nn.Embedding(5, 4)]), nn.Embedding(5, 4)])
    with pytest.raises(
        dk.TargetError, match=r"0: .* ModuleList has no linear .* at='0\.0'; it can serve 0\.0; or leave"
    ):
        dk.plan(model, dk.LoRA(r=2, at="0"))
    assert dk.plan(model, dk.LoRA(r=2, at="0.0")).paths == {"lora": ["0.0"]}


def equal():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))


def test_an_option_that_fits_no_default_position_is_the_error():
    """As `at="0"` says it. The advice is followed."""
    with pytest.raises(dk.OptionError, match=r"^0: rank 8 is above the layer's size 6 to 6; use LoRA\(r=6\) or less"):
        dk.plan(equal(), dk.LoRA())
    assert dk.plan(equal(), dk.LoRA(r=6)).paths == {"lora": ["0"]}


def test_an_option_that_fits_other_layers_only_is_said_beside_them():
    model = nn.Sequential(nn.Linear(3, 19), nn.ReLU(), nn.Linear(19, 23))
    told = (
        r"0: rank 8 is above .* use LoRA\(r=3\) or less, .*; or name targets with at=, such as at='2'; it can serve 2$"
    )
    with pytest.raises(dk.RoleError, match=told):
        dk.plan(model, dk.LoRA(r=8))


@pytest.mark.parametrize(
    ("make", "at"), [(lambda: nn.Linear(6, 6), "^"), (lambda: nn.Sequential(nn.Linear(6, 6)), "0"), (Bare, "w")]
)
def test_an_option_that_fits_nothing_is_named_with_the_selector(make, at):
    with pytest.raises(dk.RoleError) as caught:
        dk.plan(make(), dk.LoRA(r=8))
    found = re.search(r"at='(.+)', and other options: \S.*: rank 8 is above .* use LoRA\(r=(\d)\)", str(caught.value))
    assert found, str(caught.value)
    assert found[1] == at
    assert dk.attach(make(), dk.LoRA(r=int(found[2]), at=at)).num_parameters == 2 * 6 * 6


def test_messages_name_the_backbone_itself():
    with pytest.raises(dk.OptionError, match=r"^the backbone: rank 8 is above the layer's size 6 to 6"):
        dk.plan(nn.Linear(6, 6), dk.LoRA(at="^"))
