"""Methods that change weights against the formulas of their papers in float64, and against PEFT on the same weights."""

import copy
import warnings

import peft
import pytest
import torch
from torch.nn import functional as F

import deltakit as dk
from deltakit.methods.vblora import VectorBank
from support.weight_methods import CASES, attached, chain, frozen

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
each = pytest.mark.parametrize("name", CASES)


def matrix(layer):
    """The weight [d_out, d_in]."""
    return layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T


def by_formula(case, model, delta, x):
    """The output with the weights of the paper's formula."""
    new = {}
    for path, (module,) in delta.modules.items():
        tensors = {name: value.detach().double() for name, value in module.named_parameters() if "shared" not in name}
        weight = matrix(model.get_submodule(path)).detach()
        new[path] = weight + case.update(weight, tensors, frozen(module))
    y = F.linear(x, new["first"], model.first.bias)
    return F.linear(torch.tanh(y), new["second"], model.second.bias) if "second" in new else torch.tanh(y)


@each
def test_it_is_its_formula(name):
    case = CASES[name]
    model, x = chain(case)
    bare = model(x)
    delta = attached(case, model)
    expected = by_formula(case, model, delta, x)
    assert not torch.allclose(model(x), bare)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    # A single token without gradients takes another way.
    with torch.no_grad():
        torch.testing.assert_close(model(x[0, :1]), expected[0, :1], **CLOSE)
    delta.merge()
    torch.testing.assert_close(model(x), expected, **CLOSE)
    delta.unmerge()
    delta.detach()
    assert torch.equal(model(x), bare)


def by_peft(case, model, delta):
    """PEFT's model with the values of a delta."""
    config = copy.deepcopy(case.theirs)
    config.target_modules = delta.backbone.targets
    with warnings.catch_warnings():
        # Of fan_in_fan_out.
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(model, config).eval().double()
    with torch.no_grad():
        for path, (module,) in delta.modules.items():
            layer = other.base_model.model.get_submodule(path)
            for ours, theirs in case.names.items():
                held = getattr(layer, theirs)["default"]
                value = dict(module.named_parameters())[ours]
                getattr(held, "weight", held).copy_(value.mT if ours in case.turned else value)
            if isinstance(module.shared, VectorBank):
                layer.vblora_vector_bank["default"].copy_(module.shared.bank)
    return other


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.theirs is not None])
def test_peft_computes_the_same_with_the_same_values(name):
    case = CASES[name]
    model, x = chain(case)
    twin = copy.deepcopy(model)
    delta = attached(case, model)
    other = by_peft(case, twin, delta)
    x.requires_grad_()
    found, expected = model(x), other(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    g = torch.randn_like(found)
    torch.testing.assert_close(torch.autograd.grad(found, x, g), torch.autograd.grad(expected, x, g), **CLOSE)


@each
def test_gradients_are_those_of_the_formula(name):
    case = CASES[name]
    model, x = chain(case)
    delta = attached(case, model)
    found = torch.autograd.grad(model(x).square().sum(), list(delta.parameters()))
    own = list(delta.parameters())
    step, values = 1e-6, [parameter.detach().clone() for parameter in own]
    torch.manual_seed(5)
    way = [torch.randn_like(value) for value in values]
    at = []
    with torch.no_grad():
        for sign in (1, -1):
            for parameter, value, direction in zip(own, values, way, strict=True):
                parameter.copy_(value + sign * step * direction)
            at.append(by_formula(case, model, delta, x).square().sum())
    slope = (at[0] - at[1]) / (2 * step)
    torch.testing.assert_close(sum((f * d).sum() for f, d in zip(found, way, strict=True)), slope, rtol=1e-5, atol=1e-5)


@each
def test_a_weighted_sum_is_exact_or_refused(name):
    case = CASES[name]
    model, x = chain(case)
    deltas = {key: attached(case, model, key) for key in ("one", "two")}
    weights = {"one": 0.7, "two": -0.3}
    try:
        combined, error = dk.combine(model, weights)
    except dk.TargetError as refusal:
        assert "has no weighted sums" in str(refusal)
        return
    assert error < 1e-10
    for key, delta in deltas.items():
        delta.scale = weights[key]
    expected = model(x)
    for delta in deltas.values():
        delta.detach()
    combined.attach()
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_the_frozen_factors_of_vera_are_those_of_peft():
    case = CASES["VeRA"]
    model, _ = chain(case)
    (module,) = attached(case, model).modules["second"]
    twin, _ = chain(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.VeraConfig(r=3, projection_prng_key=4, target_modules=model.targets)
        other = peft.get_peft_model(twin.float(), config)
    for ours, theirs in (("A", other.vera_A), ("B", other.vera_B)):
        assert torch.equal(module.shared.get_buffer(ours), theirs["default"].double())
