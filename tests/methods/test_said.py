"""SAID against the dense formula in float64; exact gradients; norms and angles of the projections; what a file has."""

import copy

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.ops import fastfood
from deltakit.ops.fastfood import Fastfood, _mixed, key_of_name, walsh_hadamard
from support.models import Transformer, ids, randomize


@pytest.fixture
def small(monkeypatch):
    """Blocks of 64 numbers, so that dense matrices fit."""
    monkeypatch.setattr(fastfood, "_SMALLEST", 64)


def dense(n):
    """H_n by Sylvester's construction."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < n:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), found)
    return found


@pytest.mark.parametrize("n", [1, 2, 32, 64, 2048])
def test_walsh_hadamard(n):
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), x @ dense(n), rtol=1e-12, atol=1e-10)


def projection(size, name, shape, seed=5):
    one = Fastfood(size, seed, torch.device("cpu"))
    return torch.stack([one(e, key_of_name(name), shape).flatten() for e in torch.eye(size, dtype=torch.float64)], 1)


def test_equals_the_dense_formula_in_float64(small):
    """Two blocks and a part of a third: H G P H B each, with their own signs and normal numbers."""
    size, shape, n = 23, (11, 13), 64
    one, draw = projection(size, "a", shape), Fastfood(size, 5, torch.device("cpu")).draw
    mixed = _mixed(_mixed(torch.tensor(0xE8B7BE43 + (5 << 32))) + torch.arange(3))
    places = torch.stack([mixed % n, (mixed >> 32) % n])
    assert len(set(places.flatten().tolist())) > 3
    h, order = dense(n), torch.eye(n, dtype=torch.float64)[draw.order]
    blocks = []
    for b, g in places.T.tolist():
        signs, numbers = draw.signs.double().roll(-b), draw.normal.double().roll(-g)
        blocks.append(h @ numbers.diag() @ order @ h @ signs.diag())
    wanted = torch.cat(blocks)[:143, :size] / (143 * draw.normal.double().square().sum()).sqrt()
    torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_are_exact(small):
    """Those of the authors' copies are too small by a factor of 64 here, which is √n for each of two transforms."""
    one = Fastfood(23, 5, torch.device("cpu"))
    x = torch.randn(23, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: one(x, 3, (11, 13)), x)


def test_projections_keep_norms_and_are_nearly_orthogonal():
    first, second = projection(100, "a", (151, 211)), projection(100, "b", (151, 211))
    gram = first.T @ first
    assert (gram.diagonal() - 1).abs().max() < 0.05
    assert (gram - gram.diagonal().diag()).abs().max() < 0.05
    # Those of two weights have nothing in common.
    assert (first.T @ second).abs().max() < 0.05
    assert (projection(100, "a", (151, 211), seed=6).T @ first).abs().max() < 0.05


@pytest.mark.parametrize("structured", [True, False])
def test_equals_changed_weights(structured):
    model = Transformer().double().eval()
    delta = randomize(dk.attach(model, dk.SAID(size=29, structured=structured)))
    targets = [
        path for path, module in model.named_modules() if path.startswith("layers") and type(module) is nn.Linear
    ]
    assert sorted(delta.modules) == sorted(targets)
    assert delta.num_parameters == 29
    twin, wanted = copy.deepcopy(model), model(ids())
    dk.deltas(twin)[0].detach()
    for path, (module,) in delta.modules.items():
        weight = twin.get_submodule(path).weight
        factor = module.factor if structured else 1.0
        weight.data += (
            factor * module.shared.projection(module.shared.theta, key_of_name(path), tuple(weight.shape))
        ).detach()
    torch.testing.assert_close(wanted, twin(ids()), rtol=1e-10, atol=1e-10)
    wanted.square().sum().backward()
    loss = lambda: model(ids()).square().sum().item()  # noqa: E731
    for parameter in delta.parameters():
        gradient, values = parameter.grad[0].item(), parameter.data
        values[0] += 1e-6
        up = loss()
        values[0] -= 2e-6
        assert gradient == pytest.approx((up - loss()) / 2e-6, rel=1e-4, abs=1e-6)
        values[0] += 1e-6


def test_a_file_has_the_seed_and_no_projection(tmp_path):
    model = Transformer().eval()
    delta = randomize(dk.attach(model, dk.SAID(size=40, seed=7)))
    wanted = model(ids())
    assert sum(value.numel() for value in delta.state_dict().values()) == 40
    delta.save(tmp_path)
    delta.detach()
    dk.load(tmp_path, model)
    assert torch.equal(model(ids()), wanted)
    other = dk.load(tmp_path, copy.deepcopy(model), name="other")
    assert other.num_parameters == 40


def test_steps_keep_no_update():
    """Of the square weight nothing is kept for the backward pass but the input."""
    model = nn.Sequential(nn.Linear(128, 128))
    randomize(dk.attach(model, dk.SAID(size=30, at="0")))
    kept, weight = [], model[0].weight.data_ptr()
    x = torch.randn(2, 128)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert kept
    # A reference to the weight, which is there anyway, takes no memory.
    assert max(t.numel() for t in kept if t.data_ptr() != weight) < 128 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"SAID\(size=0\): expected at least 1"),
        ({"seed": -1}, r"SAID\(seed=-1\): expected a number from 0"),
        ({"size": 12}, r"12 targets have a factor each, .*; pass size=13 or more, or structured=False"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.attach(Transformer(), dk.SAID(**options))
