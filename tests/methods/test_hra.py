"""HRA against the paper's formula in float64 and against PEFT, its start, convolutions, and bad options."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer, attached, ids
from support.peft_layers import CLOSE, alike, conv1d, linear, with_peft

peft = pytest.importorskip("peft")


def reflections(module):
    """H_1 ... H_r as a matrix, one after the other."""
    product = torch.eye(module.size, dtype=torch.float64)
    for u in module.u.detach():
        product = product @ (torch.eye(module.size, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u))
    return product


@pytest.mark.parametrize("make", [linear, conv1d])
@torch.no_grad()
def test_it_is_its_formula(make):
    layer, x = make(11, 7), torch.randn(2, 5, 11, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    delta = attached(model, dk.HRA(at="0", r=6))
    (module,) = delta.modules["0"]
    turn = reflections(module)
    assert not torch.allclose(turn, torch.eye(11, dtype=torch.float64), atol=0.1)
    weight = (layer.weight if make is linear else layer.weight.T).clone()
    expected = x @ (weight @ turn).T + layer.bias
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)


@torch.no_grad()
def test_a_convolution_is_reflected_in_its_channels():
    model = nn.Sequential(nn.Conv2d(5, 7, (2, 3))).double().eval()
    x, weight, bias = torch.randn(2, 5, 4, 11, dtype=torch.float64), model[0].weight.clone(), model[0].bias.clone()
    delta = attached(model, dk.HRA(at="0", r=4))
    turn = reflections(delta.modules["0"][0])
    expected = nn.functional.conv2d(torch.einsum("dc,bchw->bdhw", turn, x), weight, bias)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)


@pytest.mark.parametrize("r", [2, 8])
def test_pefts_outputs_gradients_and_weights(r):
    """PEFT multiplies the weight by a matrix [d_in, d_in] in each forward."""
    layer, x = linear(11, 7), torch.randn(2, 5, 11, dtype=torch.float64)
    # Its forward starts from an identity matrix in torch's default dtype.
    torch.set_default_dtype(torch.float64)
    try:
        theirs, values = with_peft(layer, peft.HRAConfig(target_modules=["0"], r=r))
        alike(layer, dk.HRA(at="0", r=r), {"u": values["hra_u"].T}, theirs, x)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_start_is_a_no_op_up_to_rounding():
    """As in the paper: the vectors start in equal pairs. PEFT also starts odd numbers of them, with another function."""
    model = Transformer().double().eval()
    bare = model(ids())
    delta = dk.attach(model, dk.HRA())
    u = delta.modules["layers.0.self_attn.q_proj"][0].u
    assert torch.equal(u[::2], u[1::2])
    torch.testing.assert_close(model(ids()), bare, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        u[0] += 0.3
    assert not torch.allclose(model(ids()), bare, atol=1e-4)


@pytest.mark.parametrize("r", [0, 3, -2])
def test_bad_options(unchecked, r):
    with pytest.raises(dk.OptionError, match=rf"HRA\(r={r}\): expected an even number of at least 2"):
        dk.HRA(r=r)
