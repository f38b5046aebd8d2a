"""Compacter and LowRankAdapter against their papers' formulas in float64, the shared rule, and OpenDelta's counts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from support.models import Transformer, attached, ids
from support.tiny_transformers import build


def kronecker(layer, rule):
    """The weight [d_in, d_out] of a PHM layer, as section 4 of the paper builds it."""
    return sum(torch.kron(rule[i], layer.left[i] @ layer.right[i]) for i in range(len(rule)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("r", [1, 2])
def test_compacter_is_its_formula(shared, r, bias):
    layer = nn.Linear(7, 33).double()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    y = layer(x)
    method = dk.Compacter(size=6, division=3, r=r, shared_rule=shared, bias=bias, at="layer")
    attached(nn.ModuleDict({"layer": layer}), method)
    delta = layer.delta_compacter
    rules = [delta.shared.rule] * 2 if shared else [delta.down.own.rule, delta.up.own.rule]
    down, up = (kronecker(part, rule) for part, rule in zip((delta.down, delta.up), rules, strict=True))
    assert (down.shape, up.shape) == ((33, 6), (6, 33))
    biases = (delta.down.bias, delta.up.bias) if bias else (0, 0)
    expected = y + F.gelu(y @ down + biases[0], approximate="tanh") @ up + biases[1]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [1, 3])
def test_low_rank_adapter_is_its_formula(r):
    layer = nn.Linear(7, 13).double()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    y = layer(x)
    attached(nn.ModuleDict({"layer": layer}), dk.LowRankAdapter(size=5, r=r, activation="relu", at="layer"))
    down, up = layer.delta_low_rank_adapter.down, layer.delta_low_rank_adapter.up
    assert (down.A.shape, down.B.shape, up.A.shape, up.B.shape) == ((r, 13), (5, r), (r, 5), (13, r))
    expected = y + torch.relu(y @ (down.A.T @ down.B.T) + down.bias) @ (up.A.T @ up.B.T) + up.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_start_values_are_those_of_the_authors_code():
    """Glorot-uniform with a gain of sqrt(2), 0.01 for the rule, zero for biases and for the last factor."""
    state = dk.attach(nn.Linear(7, 404), dk.Compacter(at="^", size=32)).state_dict()
    left = state["compacter.down.left"]
    bound = math.sqrt(12 / (101 + 1))
    assert 0.9 * bound < left.abs().max() <= bound
    assert state["compacter.shared.rule"].std() == pytest.approx(0.01, rel=0.4)
    assert not any(state[f"compacter.{name}"].any() for name in ("up.right", "up.bias", "down.bias"))
    state = dk.attach(nn.Linear(7, 404), dk.LowRankAdapter(at="^", size=32)).state_dict()
    assert state["low_rank_adapter.down.A"].abs().max() <= math.sqrt(12 / 405)
    assert not any(state[f"low_rank_adapter.{name}"].any() for name in ("up.B", "up.bias", "down.bias"))


def test_sizes():
    delta = dk.attach(Transformer(), dk.Compacter())
    # 20 features over 32 is nothing; the size is at least the number of products.
    assert delta.modules["layers.0.mlp.down_proj"][0].summary() == "size=4 n=4 r=1 gelu_tanh"
    delta = dk.attach(Transformer(), dk.LowRankAdapter(reduction=3))
    assert delta.modules["layers.0.mlp.down_proj"][0].summary() == "size=6 r=1 gelu_tanh"


def test_all_targets_share_one_rule(tmp_path):
    model = Transformer()
    fresh = copy.deepcopy(model)
    delta = attached(model, dk.Compacter(division=5))
    names = [name for name, _ in delta.named_parameters() if "rule" in name]
    assert names == ["layers.0.self_attn.o_proj.compacter.shared.rule"]
    # Both factors are as long as the two sizes, 20 and 5, and the biases have 5 and 20.
    assert delta.num_parameters == 5**3 + 4 * (20 + 5 + 5 + 5 + 20 + 20)
    model(ids()).square().sum().backward()
    assert delta.modules["layers.1.mlp.down_proj"][0].shared.rule.grad.any()
    delta.save(tmp_path)
    assert sum("rule" in name for name in load_file(tmp_path / "delta_model.safetensors")) == 1
    loaded = dk.load(tmp_path, fresh)
    assert torch.equal(fresh(ids()), model(ids()))
    assert loaded.num_parameters == delta.num_parameters
    assert len({id(module.shared) for held in loaded.modules.values() for module in held}) == 1


def test_compacter_without_attention_is_compacter_plus_plus():
    delta = dk.attach(build("bert"), dk.Compacter(at="@ff.down"))
    assert list(delta.modules) == [f"encoder.layer.{i}.output.dense" for i in (0, 1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.Compacter(division=0), r"Compacter\(division=0\): expected at least 1"),
        (lambda: dk.Compacter(r=0), r"Compacter\(r=0\): expected at least 1"),
        (lambda: dk.Compacter(size=6), r"Compacter\(size=6, division=4\): expected a size that .*; use size=8"),
        (lambda: dk.Compacter(size=4, reduction=2), r"Compacter\(size=4, reduction=2\): omit one"),
        (lambda: dk.Compacter(activation="gelo"), r"Compacter\(activation='gelo'\): expected one of gelu, "),
        (lambda: dk.LowRankAdapter(r=0), r"LowRankAdapter\(r=0\): expected a rank of at least 1"),
        (lambda: dk.LowRankAdapter(reduction=0), r"LowRankAdapter\(reduction=0\): expected at least 1"),
    ],
)
def test_bad_options(unchecked, make, message):
    with pytest.raises(dk.OptionError, match=message):
        make()


def test_options_that_do_not_fit_the_target():
    model = nn.ModuleDict({"layer": nn.Linear(7, 9)})
    with pytest.raises(
        dk.OptionError, match=r"layer: Compacter\(division=4\) does not divide its 9 features; use division=3"
    ):
        dk.attach(model, dk.Compacter(at="layer"))
    dk.attach(model, dk.Compacter(at="layer", division=3)).detach()
    with pytest.raises(dk.OptionError, match=r"layer: rank 3 is above .* 9 to 2; use LowRankAdapter\(r=2\) or less"):
        dk.attach(model, dk.LowRankAdapter(at="layer", size=2, r=3))
    dk.attach(model, dk.LowRankAdapter(at="layer", size=2, r=2))
