"""SHiRA against the paper's formula in float64 and against PEFT; its places in files, sums, and bad options."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import attached
from support.peft_layers import CLOSE, alike, conv1d, linear, summed, with_peft


@pytest.mark.parametrize("make", [linear, conv1d])
@torch.no_grad()
def test_it_is_its_formula(make):
    layer, x = make(11, 7), torch.randn(2, 5, 11, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    bare, delta = model(x), attached(model, dk.SHiRA(at="0", r=2))
    (module,) = delta.modules["0"]
    assert module.values.shape == (36,)
    assert len({tuple(place) for place in module.places.T.tolist()}) == 36
    change = torch.zeros(7, 11, dtype=torch.float64)
    for (row, column), value in zip(module.places.T.tolist(), module.values, strict=True):
        change[row, column] = value
    expected = bare + x @ change.T
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)


# PEFT's own sparse tensor.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_pefts_outputs_gradients_and_weights():
    peft = pytest.importorskip("peft")
    layer, x = linear(11, 7), torch.randn(2, 5, 11, dtype=torch.float64)
    theirs, values = with_peft(layer, peft.ShiraConfig(target_modules=["0"], r=2, random_seed=5))
    places = theirs.base_model.model[0].shira_indices["default"]
    given = {"values": values["shira_weight"], "places": places}
    delta = alike(layer, dk.SHiRA(at="0", r=2, seed=9), given, theirs, x)
    (entries,) = delta.parameters()
    torch.testing.assert_close(entries.grad, values["shira_weight"].grad, **CLOSE)
    # Of one seed the places are PEFT's own.
    (other,) = dk.attach(nn.Sequential(linear(11, 7)), dk.SHiRA(at="0", r=2, seed=5)).modules["0"]
    assert torch.equal(other.places, places)


@torch.no_grad()
def test_a_file_keeps_the_places(tmp_path):
    x = torch.randn(2, 5, 11, dtype=torch.float64)
    model, fresh = nn.Sequential(linear(11, 7)).eval(), nn.Sequential(linear(11, 7)).eval()
    delta = attached(model, dk.SHiRA(at="0", r=2))
    # Any other mask.
    delta.modules["0"][0].places.copy_(torch.stack([torch.arange(36) // 11, torch.arange(36) % 11]))
    delta.save(tmp_path)
    (loaded,) = dk.load(tmp_path, fresh).modules["0"]
    assert torch.equal(loaded.places, delta.modules["0"][0].places)
    assert torch.equal(fresh(x), model(x))


@torch.no_grad()
def test_places_outside_of_the_weight_are_refused(tmp_path):
    model = nn.Sequential(linear(11, 7))
    delta = attached(model, dk.SHiRA(at="0", r=2))
    delta.modules["0"][0].places[0, 3] = 7
    delta.save(tmp_path)
    with pytest.raises(
        dk.CheckpointError, match="SHiRA has places outside of a weight of 7 to 11; the file is damaged"
    ):
        dk.load(tmp_path, nn.Sequential(linear(11, 7)))


def test_a_small_weight_is_trained_in_all_entries():
    (module,) = dk.attach(nn.Sequential(nn.Linear(5, 3)), dk.SHiRA(at="0")).modules["0"]
    assert module.values.shape == (15,)


def test_sums():
    model, parts = summed(*[dk.SHiRA(at="0", r=2)] * 2)
    other = attached(model, dk.SHiRA(at="0", r=2, seed=1), name="other")
    with pytest.raises(dk.TargetError, match="SHiRA has sums of one set of places only"):
        dk.combine(model, {other: 1.0, parts[0]: 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"SHiRA\(r=0\): expected a rank of at least 1; 32 is usual"),
        ({"seed": -1}, r"SHiRA\(seed=-1\): expected a seed of at least 0"),
    ],
)
def test_bad_options(unchecked, options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.SHiRA(**options)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.Linear(11, 7),
            r"^0: SHiRA\(r=5\) trains 90 entries, and its weight has 77; use r=4 or less, or leave it out",
        ),
        (nn.Linear(11, 1), r"^0: SHiRA\(r=5\) trains 60 entries, and its weight has 11; omit r, or leave it out"),
        (nn.Embedding(50, 7), "^0: SHiRA changes maps of features, but an embedding takes ids"),
    ],
)
def test_what_does_not_fit(layer, message):
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(nn.Sequential(layer), dk.SHiRA(at="0", r=5))
