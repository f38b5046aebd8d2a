"""IA3 against its paper's formula: which side is scaled, and what merging makes of weights and biases."""

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.methods.ia3 import IA3
from support.models import Transformer, attached


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("bias", [True, False])
def test_scales_on_either_side(side, bias):
    """With the sides exchanged the sizes differ; without the bias's part, merging an output scale would leave the bias."""
    layer = nn.Linear(7, 5, bias=bias).double()
    x = torch.randn(3, 7).double()
    delta = attached(nn.ModuleDict({"layer": layer}), IA3(side=side, at="layer"))
    (scale,) = delta.state_dict().values()
    assert scale.shape == ((7,) if side == "input" else (5,))
    linear = torch.nn.functional.linear
    before, behind = (scale, 1) if side == "input" else (1, scale)
    wanted = linear(x * before, layer.weight, layer.bias) * behind
    torch.testing.assert_close(layer(x), wanted)
    delta.merge()
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_convolution_merges(side):
    """Each channel has one scale for all places of the kernel."""
    conv = nn.Conv2d(3, 7, (2, 5)).double()
    delta = attached(nn.ModuleDict({"conv": conv}), IA3(side=side, at="conv"))
    x = torch.randn(2, 3, 7, 11).double()
    hooked = conv(x)
    delta.merge()
    torch.testing.assert_close(conv(x), hooked)


def test_the_paper_s_places():
    """Keys, values, and the inner features of the feed-forward part (section 3.3)."""
    delta = dk.attach(Transformer(1), IA3())
    sizes = {path.rpartition(".")[2]: modules[0].scale.numel() for path, modules in delta.modules.items()}
    assert sizes == {"k_proj": 20, "v_proj": 20, "down_proj": 28}
