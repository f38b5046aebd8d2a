"""Low-rank methods that write their product in another way than with their factors."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from deltakit.ops import LowRank
from support.models import randomize

METHODS = {
    "vera": (dk.VeRA(r=5, at="0"), 7, 11),
    "miss": (dk.MiSS(r=3, at="0"), 7, 11),
    "miss of few rows": (dk.MiSS(r=3, mini=5, at="0"), 7, 10),
    "gralora": (dk.GraLoRA(r=6, k=3, at="0"), 9, 12),
    "gralora beside a LoRA": (dk.GraLoRA(r=6, k=3, hybrid=2, at="0"), 9, 12),
}
BACKBONES = {"linear": lambda i, o: nn.Linear(i, o), "conv1d": lambda i, o: Conv1D(o, i)}


@pytest.fixture(params=METHODS)
def case(request):
    return METHODS[request.param]


def attached(case, kind="linear", dtype=torch.float64):
    method, d_in, d_out = case
    model = nn.Sequential(BACKBONES[kind](d_in, d_out)).to(dtype)
    delta = randomize(dk.attach(model, method))
    delta.scale = 0.7
    assert type(delta.modules["0"][0]).add_product is not LowRank.add_product
    return model, delta, torch.randn(2, 5, d_in, dtype=dtype, requires_grad=True)


def with_factors(model, delta, x):
    """The formula of the factors: y + s x A^T B^T."""
    module = delta.modules["0"][0]
    with delta.detached():
        y = model(x)
    a, b = module.factors()
    return y + module.scaling * delta.scale * (x @ a.to(x.dtype).mT @ b.to(x.dtype).mT)


def gradients(output, x, delta):
    return torch.autograd.grad(output.sin().sum(), [x, *delta.parameters()])


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("shape", [(2, 5), (5,), (), (1, 1), (2, 0)])
def test_it_is_the_product_of_the_factors(case, kind, shape):
    model, delta, _ = attached(case, kind)
    x = torch.randn(*shape, case[1], dtype=torch.float64, requires_grad=True)
    output, wanted = model(x), with_factors(model, delta, x)
    torch.testing.assert_close(output, wanted)
    for found, expected in zip(gradients(output, x, delta), gradients(wanted, x, delta), strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)


def test_outputs_that_are_not_contiguous(case):
    _, delta, x = attached(case)
    module, y = delta.modules["0"][0], torch.randn(2, case[2], 5, dtype=torch.float64).mT
    assert not y.is_contiguous()
    a, b = module.factors()
    expected = y + module.scaling * 0.7 * (x @ a.mT @ b.mT)
    torch.testing.assert_close(module(x, y), expected)
    torch.testing.assert_close(module(x.transpose(0, 1), y.transpose(0, 1)), expected.transpose(0, 1))


def test_second_derivatives(case):
    model, _, x = attached(case)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def of(x, *values):
        return torch.func.functional_call(model, dict(zip(trained, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(of, (x, *trained.values()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_functional_transforms(case):
    model, _, x = attached(case)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, one):
        return torch.func.functional_call(model, values, (one,)).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    for name, each in found.items():
        for row, one in zip(each, x, strict=True):
            torch.testing.assert_close(row, torch.func.grad(loss)(trained, one)[name])
    _, slope = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    step = 1e-6
    with torch.no_grad():
        torch.testing.assert_close(slope, (model(x + step) - model(x - step)) / (2 * step), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_and_autocast(case, autocast):
    model, delta, x = attached(case, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), with_factors(model, delta, x).float(), atol=0.15, rtol=0.03)
    assert all(g.isfinite().all() and g.dtype is x.dtype for g in gradients(output.float(), x, delta))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_traces_and_exports_serve_other_numbers_of_examples(case):
    model, _, x = attached(case)
    traced = torch.jit.trace(model, x.detach(), check_trace=False)
    exported = torch.export.export(
        model, (x.detach(),), dynamic_shapes=({0: torch.export.Dim("examples")},), strict=False
    ).module()
    other = torch.randn(3, *x.shape[1:], dtype=x.dtype)
    torch.testing.assert_close(traced(other), model(other))
    torch.testing.assert_close(exported(other), model(other))


def test_a_subclass_with_other_factors_has_no_product(case, monkeypatch):
    """`add_product` of the class above would be that of other factors."""
    model, delta, x = attached(case)
    kind = type(delta.modules["0"][0])

    class Twice(kind):
        def factors(self):
            a, b = super().factors()
            return a, 2 * b

    with delta.detached():
        y = model(x)
        monkeypatch.setattr(type(case[0]), "kind_at", lambda self, target: Twice)
        other = dk.attach(model, case[0], name="other")
        other.load_state_dict(dict(zip(other.state_dict(), delta.state_dict().values(), strict=True)))
        twice = model(x)
        other.detach()
    torch.testing.assert_close(twice - y, 2 / 0.7 * (model(x) - y))


def test_parameters_of_another_dtype(case):
    model, delta, x = attached(case, dtype=torch.float32)
    wanted = with_factors(model, delta, x)
    for module in delta.modules["0"]:
        module.double()
    output = model(x)
    assert output.dtype is torch.float32
    torch.testing.assert_close(output, wanted)
    gradients(output, x, delta)
