"""One layer with an adapter of PEFT that has random values, to compare with a delta that has the same ones."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from support.models import attached

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def linear(d_in=12, d_out=7):
    """A linear layer in float64."""
    torch.manual_seed(3)
    return nn.Linear(d_in, d_out).double()


def conv1d(d_in=12, d_out=7):
    """transformers' Conv1D in float64, with a bias that is not zero."""
    torch.manual_seed(3)
    layer = Conv1D(d_out, d_in).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def with_peft(layer, config, scale=0.3):
    """The layer in a model of PEFT with random values, and these by their names, without the adapter's."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    own = {
        name.split(".default")[0].rpartition(".")[2]: parameter
        for name, parameter in theirs.named_parameters()
        if ".default" in name
    }
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in own.values():
            parameter.data = parameter.double()
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return theirs, own


def with_delta(layer, method, values):
    """The layer in a model with a delta that has these values, and the delta."""
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    delta = dk.attach(model, method)
    delta.load_state_dict({f"0.{method.name}.{name}": value.detach() for name, value in values.items()})
    return model, delta


def alike(layer, method, values, theirs, x, close=CLOSE):
    """Whether a delta has the outputs, the gradient of the input and the merged weights of PEFT's model."""
    model, delta = with_delta(layer, method, values)
    given, wanted = (x.clone().requires_grad_(x.is_floating_point()) for _ in range(2))
    found, expected = model(given), theirs(wanted)
    assert not torch.allclose(found, nn.Sequential(layer)(x))
    torch.testing.assert_close(found, expected, **close)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(given.grad, wanted.grad, **close)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **close)
    delta.unmerge()
    return delta


def summed(*methods):
    """The model and the parts of a `combine` that was compared with the sum of what the parts do alone. Both are detached."""
    model, x = nn.Sequential(linear(11, 7)).eval(), torch.randn(2, 5, 11, dtype=torch.float64)
    bare, changes, parts = model(x), [], []
    for number, method in enumerate(methods):
        delta = attached(model, method, name=f"part{number}")
        changes.append(model(x) - bare)
        parts.append(delta.detach())
    delta = dk.combine(model, {parts[0]: 0.5, parts[1]: -2.0}, name="sum").delta.attach()
    torch.testing.assert_close(model(x), bare + 0.5 * changes[0] - 2 * changes[1], **CLOSE)
    delta.detach()
    return model, parts
