"""BitFit as an added bias in float64, with or without a bias that is there."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer, attached, ids
from support.tiny_transformers import build


def test_bitfit_is_an_added_bias_with_or_without_one():
    model = build("llama").double()
    delta = attached(model, dk.BitFit())
    assert {path.rpartition(".")[2] for path in delta.modules} >= {"q_proj", "down_proj", "norm"}
    norm = model.norm
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    bias = norm.delta_bitfit.bias
    torch.testing.assert_close(norm(x) - bias, delta.detach().backbone.norm(x), rtol=1e-12, atol=1e-12)


def test_bitfit_on_a_convolution_is_one_value_a_channel():
    conv = nn.Conv2d(3, 7, 2).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    plain = conv(x)
    attached(nn.ModuleDict({"conv": conv}), dk.BitFit(at="conv"))
    torch.testing.assert_close(conv(x), plain + conv.delta_bitfit.bias[:, None, None], rtol=1e-12, atol=1e-12)


def test_bitfit_merges_into_the_bias_that_is_there():
    model = Transformer().eval()
    delta = attached(model, dk.BitFit(at="@attn.q"))
    output = model(ids())
    torch.testing.assert_close(delta.merge().backbone(ids()), output)
    delta.detach()
    bare = attached(model, dk.BitFit(at="@attn.k"))
    with pytest.raises(
        dk.TargetError, match=r"layers\.0\.self_attn\.k_proj: a Linear without a bias has nothing to merge"
    ):
        bare.merge()


def test_bitfit_smaller_variant():
    delta = dk.attach(Transformer(), dk.BitFit(subset="query_mlp"))
    assert {path.rpartition(".")[2] for path in delta.modules} == {"q_proj", "up_proj"}
