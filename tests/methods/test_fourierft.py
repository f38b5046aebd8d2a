"""FourierFT against the paper's formula in float64 and against PEFT; places, sums, and bad options."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from support.models import attached
from support.peft_layers import CLOSE, conv1d, linear, summed, with_delta, with_peft


def update(module, d_out, d_in):
    """The real part of the inverse transform, written out as a sum of waves."""
    places = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(777))[: len(module.spectrum)]
    i, j = torch.arange(d_out).double()[:, None], torch.arange(d_in).double()
    total = torch.zeros(d_out, d_in, dtype=torch.float64)
    for value, place in zip(module.spectrum.detach(), places.tolist(), strict=True):
        row, column = divmod(place, d_in)
        total += value * torch.cos(2 * math.pi * (row * i / d_out + column * j / d_in)) / (d_out * d_in)
    return 150 * total


@pytest.mark.parametrize("make", [linear, conv1d])
@torch.no_grad()
def test_it_is_its_formula(make):
    layer, x = make(11, 7), torch.randn(2, 5, 11, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    bare, delta = model(x), attached(model, dk.FourierFT(at="0", n=20))
    expected = bare + x @ update(delta.modules["0"][0], 7, 11).T
    assert not torch.allclose(bare, expected, atol=0.1)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)


# PEFT's transform is in float32, whatever the dtype of the model.
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("make", [linear, conv1d])
def test_pefts_outputs_and_gradients(make):
    peft = pytest.importorskip("peft")
    layer, x = make(11, 7), torch.randn(2, 5, 11, dtype=torch.float64)
    config = peft.FourierFTConfig(
        target_modules=["0"], n_frequency=20, scaling=30.0, random_loc_seed=5, fan_in_fan_out=isinstance(layer, Conv1D)
    )
    theirs, values = with_peft(layer, config)
    model, delta = with_delta(
        layer, dk.FourierFT(at="0", n=20, scaling=30.0, seed=5), {"spectrum": values["fourierft_spectrum"]}
    )
    found, expected = model(x), theirs(x)
    assert not torch.allclose(found, layer(x), atol=0.1)
    torch.testing.assert_close(found, expected, **NEAR)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **NEAR)
    delta.unmerge()
    found.sum().backward()
    expected.sum().backward()
    (spectrum,) = delta.parameters()
    torch.testing.assert_close(spectrum.grad, values["fourierft_spectrum"].grad, **NEAR)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, (2, 3)), nn.Linear(300, 200)])
def test_places(layer):
    """All entries of a small weight, and the usual number of a large one; no place twice."""
    (module,) = dk.attach(nn.Sequential(layer), dk.FourierFT(at="0")).modules["0"]
    index = module.places.index
    assert len(index) == min(1000, layer.weight.numel()) == len(module.spectrum)
    assert len(index.unique()) == len(index)
    assert index.max() < layer.weight.numel()


def test_places_are_the_same_after_a_stay_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(11, 7))
    (module,) = dk.attach(model, dk.FourierFT(at="0", n=20)).modules["0"]
    model.to_empty(device="cpu")
    (other,) = dk.attach(nn.Sequential(nn.Linear(11, 7)), dk.FourierFT(at="0", n=20)).modules["0"]
    assert torch.equal(module.places.index, other.places.index)
    assert not any("index" in name for name in model.state_dict())


def test_sums():
    model, parts = summed(*(dk.FourierFT(at="0", n=n, scaling=scaling) for n, scaling in ((20, 30.0), (33, 70.0))))
    other = attached(nn.Sequential(linear(11, 7)), dk.FourierFT(at="0", n=20, seed=3))
    with pytest.raises(dk.OptionError, match="another Sequential"):
        dk.combine(model, {other: 1.0})
    third = attached(model, dk.FourierFT(at="0", n=20, seed=3), name="third")
    with pytest.raises(dk.TargetError, match=r"FourierFT has sums of one seed only, found \[3, 777\]"):
        dk.combine(model, {third: 1.0, parts[0]: 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, r"FourierFT\(n=0\): expected at least 1 entry; 1000 is usual"),
        ({"scaling": 0.0}, r"FourierFT\(scaling=0.0\): expected a finite number above 0; 150 is usual"),
        ({"scaling": math.inf}, r"FourierFT\(scaling=inf\)"),
        ({"seed": -1}, r"FourierFT\(seed=-1\): expected a seed of at least 0"),
    ],
)
def test_bad_options(unchecked, options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.FourierFT(**options)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(5, 7), r"^0: FourierFT\(n=36\) is more than the 35 entries of its weight; use n=35 or less"),
        (nn.Embedding(50, 7), "^0: FourierFT changes maps of features, but an embedding takes ids"),
    ],
)
def test_what_does_not_fit(layer, message):
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(nn.Sequential(layer), dk.FourierFT(at="0", n=36))
