"""WaveFT against the inverse Haar transform in float64 and against PEFT; its places, sums and bad options."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import attached
from support.peft_layers import CLOSE, alike, conv1d, linear, summed, with_peft


def by_hand(spectrum):
    """The sum of all coefficients times their Haar function: a mean, or a difference of rows, columns or both."""
    (rows, columns), functions = (size // 2 for size in spectrum.shape), {0: (1, 1), 1: (1, -1)}
    new = torch.zeros_like(spectrum)
    for i in range(2 * rows):
        for j in range(2 * columns):
            # The upper right quarter has differences of rows, and the lower left one of columns.
            vertical, horizontal = functions[j // columns], functions[i // rows]
            for p in range(2):
                for q in range(2):
                    place = 2 * (i % rows) + p, 2 * (j % columns) + q
                    new[place] += spectrum[i, j] * vertical[p] * horizontal[q] / 2
    return new


@pytest.mark.parametrize("sizes", [(11, 7), (8, 6), (6, 9)])
@pytest.mark.parametrize("make", [linear, conv1d])
@torch.no_grad()
def test_it_is_its_formula(make, sizes):
    d_in, d_out = sizes
    layer, x = make(d_in, d_out), torch.randn(2, 5, d_in, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    bare, delta = model(x), attached(model, dk.WaveFT(at="0", n=29, scaling=3.0, seed=5))
    (module,) = delta.modules["0"]
    spectrum = torch.zeros(d_out + d_out % 2, d_in + d_in % 2, dtype=torch.float64)
    for place, value in zip(module.places.index.tolist(), module.spectrum, strict=True):
        spectrum[place // d_in, place % d_in] = value
    expected = bare + 3 * x @ by_hand(spectrum)[:d_out, :d_in].T
    assert not torch.allclose(model(x), bare)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)


@pytest.mark.parametrize("sizes", [(11, 7), (8, 6), (6, 9)])
def test_pefts_outputs_gradients_and_weights(sizes):
    peft = pytest.importorskip("peft")
    layer, x = linear(*sizes), torch.randn(2, 5, sizes[0], dtype=torch.float64)
    config = peft.WaveFTConfig(target_modules=["0"], n_frequency=29, random_loc_seed=5, scaling=3.0)
    theirs, values = with_peft(layer, config)
    method = dk.WaveFT(at="0", n=29, scaling=3.0, seed=5)
    delta = alike(layer, method, {"spectrum": values["waveft_spectrum"]}, theirs, x)
    (found,) = delta.parameters()
    torch.testing.assert_close(found.grad, values["waveft_spectrum"].grad, **CLOSE)


def test_sums():
    model, parts = summed(*[dk.WaveFT(at="0", n=29)] * 2)
    other = attached(model, dk.WaveFT(at="0", n=29, seed=1), name="other")
    with pytest.raises(dk.TargetError, match="WaveFT has sums of one seed, n and scaling only"):
        dk.combine(model, {other: 1.0, parts[0]: 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, r"WaveFT\(n=0\): expected at least 1 coefficient; 2592 is usual"),
        ({"scaling": 0.0}, r"WaveFT\(scaling=0.0\): expected a finite number above 0"),
        ({"seed": -1}, r"WaveFT\(seed=-1\): expected a seed of at least 0"),
    ],
)
def test_bad_options(unchecked, options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.WaveFT(**options)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(5, 7), r"^0: WaveFT\(n=36\) is above the 35 entries of its weight; use n=35 or less"),
        (nn.Embedding(50, 7), "^0: WaveFT changes maps of features, but an embedding takes ids"),
    ],
)
def test_targets_that_cannot_have_it(layer, message):
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(nn.Sequential(layer), dk.WaveFT(at="0", n=36))
