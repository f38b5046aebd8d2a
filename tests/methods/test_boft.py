"""BOFT against the paper's formula in float64 and against PEFT, several factors, block sizes, and bad options."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import attached
from support.peft_layers import CLOSE, alike, conv1d, linear, with_peft

peft = pytest.importorskip("peft")


def rotation(blocks):
    q = (blocks - blocks.mT) / 2
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q)))


@pytest.mark.parametrize("make", [linear, conv1d])
@torch.no_grad()
def test_it_is_its_formula(make):
    """W' = diag(s) W B_1 B_2 B_3, with B_i written out by the features that it turns."""
    layer, x = make(32, 7), torch.randn(2, 5, 32, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    delta = attached(model, dk.BOFT(at="0", block_size=4, factors=3))
    (module,) = delta.modules["0"]
    assert module.R.shape == (3, 8, 4, 4)
    weight = (layer.weight if make is linear else layer.weight.T).clone()
    new = weight
    for number, blocks in enumerate(module.R):
        # Half blocks 2^number apart are neighbours in this order.
        apart = 2**number
        halves = [half for start in range(16) if not start & apart for half in (start, start + apart)]
        order = torch.tensor([2 * half + within for half in halves for within in (0, 1)])
        assert sorted(order.tolist()) == list(range(32))
        turn = torch.zeros(32, 32, dtype=torch.float64)
        turn[order[:, None], order] = rotation(blocks)
        torch.testing.assert_close(turn @ turn.T, torch.eye(32, dtype=torch.float64), **CLOSE)
        new = new @ turn
    expected = x @ (module.scale[:, None] * new).T + layer.bias
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)


@pytest.mark.parametrize(
    ("theirs", "block_size"), [({"boft_block_size": 3}, 3), ({"boft_block_size": 0, "boft_block_num": 2}, 6)]
)
def test_pefts_outputs_gradients_and_weights(theirs, block_size):
    layer, x = linear(12, 7), torch.randn(2, 5, 12, dtype=torch.float64)
    other, values = with_peft(layer, peft.BOFTConfig(target_modules=["0"], **theirs), 0.2)
    given = {"R": values["boft_R"], "scale": values["boft_s"][:, 0]}
    alike(layer, dk.BOFT(at="0", block_size=block_size), given, other, x)


def test_pefts_convolution():
    layer, x = nn.Conv2d(6, 5, 3, padding=1).double(), torch.randn(2, 6, 7, 11, dtype=torch.float64)
    other, values = with_peft(layer, peft.BOFTConfig(target_modules=["0"], boft_block_size=9), 0.2)
    given = {"R": values["boft_R"], "scale": values["boft_s"].flatten()}
    alike(layer, dk.BOFT(at="0", block_size=9), given, other, x)


def test_pefts_butterfly(monkeypatch):
    """Without its CUDA extension PEFT takes one factor instead of those that were asked for, and says nothing. Here the
    extension is replaced by what it computes."""
    from peft.tuners.boft import layer as boft

    other, _ = with_peft(
        linear(32, 7), peft.BOFTConfig(target_modules=["0"], boft_block_size=4, boft_n_butterfly_factor=3)
    )
    assert other.base_model.model[0].boft_R["default"].shape[0] == 1

    class Blocks:
        apply = staticmethod(lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks]))

    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft, "FastBlockDiag", Blocks)
    layer, x = linear(32, 7), torch.randn(2, 5, 32, dtype=torch.float64)
    other, values = with_peft(
        layer, peft.BOFTConfig(target_modules=["0"], boft_block_size=4, boft_n_butterfly_factor=3), 0.2
    )
    assert values["boft_R"].shape == (3, 8, 4, 4)
    given = {"R": values["boft_R"], "scale": values["boft_s"][:, 0]}
    alike(layer, dk.BOFT(at="0", block_size=4, factors=3), given, other, x)


def test_half_the_scale_is_half_the_update():
    layer, x = linear(12, 7), torch.randn(2, 5, 12, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    bare, delta = model(x), attached(model, dk.BOFT(at="0"))
    full = model(x)
    delta.scale = 0.5
    torch.testing.assert_close(model(x), bare.lerp(full, 0.5), **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), bare.lerp(full, 0.5), **CLOSE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.BOFT(block_size=1), r"BOFT\(block_size=1\): expected at least 2 features; 4 is usual"),
        (lambda: dk.BOFT(factors=0), r"BOFT\(factors=0\): expected 1 to 32"),
    ],
)
def test_bad_options(unchecked, make, message):
    with pytest.raises(dk.OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Linear(12, 7), {"block_size": 5}, r"^0: BOFT\(block_size=5\) does not divide its 12 features; use block_size=4"),
        (nn.Linear(12, 7), {"block_size": 4, "factors": 3}, r"^0: BOFT needs a number of features that 8 divides, found 12; leave"),
        (nn.Linear(24, 7), {"block_size": 12, "factors": 3}, r"block_size=12\) times 4 does not divide its 24 features; use block_size=6"),
        (nn.Embedding(12, 4), {}, "^0: BOFT changes maps of features, but an embedding takes ids"),
    ],
)  # fmt: skip
def test_what_does_not_fit(layer, options, message):
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(nn.Sequential(layer), dk.BOFT(at="0", **options))
