"""C3A against the paper's formula in float64 and against PEFT; two deltas at one target, sums, and bad options."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import attached, randomize
from support.peft_layers import CLOSE, conv1d, linear, with_delta, with_peft


def circulant(kernel):
    """The matrix of all blocks: y_i = sum over t of w_t x_(i + t), divided by the number of inputs."""
    rows, columns, b = kernel.shape
    matrix = torch.zeros(rows * b, columns * b, dtype=torch.float64)
    for m in range(rows):
        for n in range(columns):
            for i in range(b):
                for t in range(b):
                    matrix[m * b + i, n * b + (i + t) % b] = kernel[m, n, t]
    return matrix / (columns * b)


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("block_size", [1, 2, 5, None])
@torch.no_grad()
def test_it_is_its_formula(make, block_size):
    layer, x = make(30, 20), torch.randn(2, 3, 30, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    bare, delta = model(x), attached(model, dk.C3A(at="0", block_size=block_size))
    b = block_size or 10
    assert delta.modules["0"][0].kernel.shape == (20 // b, 30 // b, b)
    expected = bare + x @ circulant(delta.modules["0"][0].kernel).T
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)


# PEFT's transforms are in float32, whatever the dtype of the model.
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def test_pefts_outputs_and_gradients():
    peft = pytest.importorskip("peft")
    layer, x = linear(30, 20), torch.randn(2, 3, 30, dtype=torch.float64)
    theirs, values = with_peft(layer, peft.C3AConfig(target_modules=["0"], block_size=5), 2.0)
    model, delta = with_delta(layer, dk.C3A(at="0", block_size=5), {"kernel": values["c3a_kernel"]})
    found, expected = model(x), theirs(x)
    assert not torch.allclose(found, layer(x), atol=0.1)
    torch.testing.assert_close(found, expected, **NEAR)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **NEAR)
    delta.unmerge()
    found.square().sum().backward()
    expected.square().sum().backward()
    (kernel,) = delta.parameters()
    torch.testing.assert_close(kernel.grad, values["c3a_kernel"].grad, **NEAR)


def test_two_deltas_at_one_target_add_up():
    """PEFT gives the second one the output of the first as its input."""
    layer, x = linear(30, 20), torch.randn(2, 3, 30, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    bare, changes, deltas = model(x), [], []
    for name in ("one", "two"):
        delta = attached(model, dk.C3A(at="0", block_size=5), name=name)
        changes.append(model(x) - bare)
        deltas.append(delta.detach())
    for delta in deltas:
        delta.attach()
    torch.testing.assert_close(model(x), bare + changes[0] + changes[1], **CLOSE)
    for delta in deltas:
        delta.detach()
    dk.combine(model, {deltas[0]: 0.5, deltas[1]: -2.0}).delta.attach()
    torch.testing.assert_close(model(x), bare + 0.5 * changes[0] - 2 * changes[1], **CLOSE)


def test_a_sum_of_two_block_sizes_is_refused():
    model = nn.Sequential(nn.Linear(30, 20))
    parts = {attached(model, dk.C3A(at="0", block_size=size), name=f"of{size}"): 1.0 for size in (2, 5)}
    with pytest.raises(dk.TargetError, match=r"C3A has sums of one block size only, found \[2, 5\]"):
        dk.combine(model, parts)


@pytest.mark.parametrize("size", [0, -3])
def test_bad_options(unchecked, size):
    with pytest.raises(dk.OptionError, match=rf"C3A\(block_size={size}\): expected at least 1 feature; 256 is usual"):
        dk.C3A(block_size=size)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.Linear(30, 20),
            r"^0: C3A\(block_size=6\) does not divide its 30 and 20 features; use block_size=5, or leave it",
        ),
        (nn.Conv1d(30, 20, 1), "^0: C3A works on linear layers, found Conv1d; leave it out with of= or exclude="),
    ],
)
def test_what_does_not_fit(layer, message):
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(nn.Sequential(layer), dk.C3A(at="0", block_size=6))


@pytest.mark.parametrize("train", [True, False])
def test_a_layer_that_gets_no_tokens(train):
    """Experts of a mixture get none now and then."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    delta = randomize(dk.attach(model, dk.C3A(block_size=2, at=["0", "1"])))
    x = torch.zeros(0, 6, requires_grad=train)
    with torch.set_grad_enabled(train):
        y = model(x)
    assert y.shape == (0, 6)
    if train:
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert not any(parameter.grad.any() for parameter in delta.parameters())
