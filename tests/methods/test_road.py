"""RoAd against the paper's formula in float64 and against PEFT in all variants; sums, merging, and bad options."""

import math

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import attached
from support.peft_layers import CLOSE, alike, conv1d, linear, with_peft

VARIANTS = {"road_1": 6, "road_2": 12, "road_4": 24}


@pytest.mark.parametrize("make", [linear, conv1d])
@torch.no_grad()
def test_it_is_its_formula(make):
    """One pair after the other, with the bias inside."""
    layer, x = make(7, 12), torch.randn(2, 5, 7, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    y = model(x)
    delta = attached(model, dk.RoAd(at="0", group_size=4))
    (module,) = delta.modules["0"]
    assert module.angle.shape == (6,)
    expected = y.clone()
    for pair in range(6):
        group, place = divmod(pair, 2)
        i, j = 4 * group + place, 4 * group + place + 2
        a, t = float(module.scale[pair]), float(module.angle[pair])
        expected[..., i] = a * math.cos(t) * y[..., i] - a * math.sin(t) * y[..., j]
        expected[..., j] = a * math.sin(t) * y[..., i] + a * math.cos(t) * y[..., j]
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 6, 12])
def test_pefts_outputs_gradients_and_weights(variant, group_size):
    peft = pytest.importorskip("peft")
    layer, x = linear(7, 12), torch.randn(2, 5, 7, dtype=torch.float64)
    config = peft.RoadConfig(target_modules=["0"], variant=variant, group_size=group_size)
    theirs, values = with_peft(layer, config)
    assert values["road_theta"].shape == (VARIANTS[variant],)
    given = {"angle": values["road_theta"], "scale": values["road_alpha"]}
    delta = alike(layer, dk.RoAd(at="0", variant=variant, group_size=group_size), given, theirs, x)
    names = {"angle": "road_theta", "scale": "road_alpha"}
    for name, parameter in delta.named_parameters():
        torch.testing.assert_close(parameter.grad, values[names[name.rpartition(".")[2]]].grad, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sum_of_rotations_is_one(variant):
    """Of pairs of features all turned and scaled matrices have sums of their kind; those of angles alone are none."""
    layer, x = linear(7, 12), torch.randn(2, 5, 7, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    y, changes, deltas = model(x), [], []
    for name in ("one", "two"):
        delta = attached(model, dk.RoAd(at="0", variant=variant, group_size=6), name=name)
        changes.append(model(x) - y)
        deltas.append(delta.detach())
    total = dk.combine(model, {deltas[0]: 0.7, deltas[1]: -1.5})
    assert total.error == 0
    total.delta.attach()
    torch.testing.assert_close(model(x), y + 0.7 * changes[0] - 1.5 * changes[1], **CLOSE)


def test_a_sum_of_two_group_sizes_is_refused():
    model = nn.Sequential(nn.Linear(7, 12))
    parts = {attached(model, dk.RoAd(at="0", group_size=size), name=f"of{size}"): 1.0 for size in (2, 4)}
    with pytest.raises(dk.TargetError, match=r"RoAd has sums of one variant and group size only, found .*'road_1', 4"):
        dk.combine(model, parts)


@pytest.mark.parametrize("size", [0, 3, -2])
def test_bad_options(unchecked, size):
    with pytest.raises(dk.OptionError, match=rf"RoAd\(group_size={size}\): expected an even number of features; 64"):
        dk.RoAd(group_size=size)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (12, {"group_size": 8}, r"^0: RoAd\(group_size=8\) does not divide its 12 features; use group_size=6"),
        (7, {}, "^0: RoAd needs a number of features that 2 divides, found 7; leave it out with exclude="),
    ],
)
def test_features_that_have_no_pairs(size, options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.attach(nn.Sequential(nn.Linear(5, size)), dk.RoAd(at="0", **options))
