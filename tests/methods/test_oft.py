"""OFT against the paper's formula in float64, both of Cayley's branches against PEFT, its blocks, and bad options."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import attached
from support.peft_layers import CLOSE, alike, conv1d, linear, with_peft
from support.tiny_transformers import build

peft = pytest.importorskip("peft")


def skew(values, size):
    q = torch.zeros(size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    q[rows, columns] = values
    return q - q.T


@pytest.mark.parametrize("make", [linear, conv1d])
@torch.no_grad()
def test_it_is_its_formula(make):
    """y = W R x + b with R = diag(R_1, ..., R_n), R_i = (I + Q_i)(I - Q_i)^-1, written out."""
    layer, x = make(12, 7), torch.randn(2, 5, 12, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    delta = attached(model, dk.OFT(at="0", block_size=3))
    (module,) = delta.modules["0"]
    assert module.skew.shape == (4, 3)
    eye = torch.eye(3, dtype=torch.float64)
    turn = torch.block_diag(*[(eye + skew(v, 3)) @ torch.linalg.inv(eye - skew(v, 3)) for v in module.skew])
    torch.testing.assert_close(turn @ turn.T, torch.eye(12, dtype=torch.float64), **CLOSE)
    weight = (layer.weight if make is linear else layer.weight.T).clone()
    torch.testing.assert_close(model(x), x @ turn.T @ weight.T + layer.bias, **CLOSE)
    merged = delta.merge().backbone[0].weight
    torch.testing.assert_close(merged if make is linear else merged.T, weight @ turn, **CLOSE)


class TestPEFT:
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ({"oft_block_size": 3}, {"block_size": 3}),
            ({"r": 3, "oft_block_size": 0}, {"blocks": 3}),
            ({"oft_block_size": 6, "block_share": True}, {"block_size": 6, "block_share": True}),
            ({"oft_block_size": 4, "use_cayley_neumann": True}, {"block_size": 4, "cayley": "neumann"}),
            ({"oft_block_size": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 4}, {"block_size": 4, "cayley": "neumann", "terms": 4}),
            ({"oft_block_size": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 7}, {"block_size": 4, "cayley": "neumann", "terms": 7}),
        ],
    )  # fmt: skip
    def test_the_same_outputs_gradients_and_weights(self, theirs, ours):
        layer, x = linear(12, 7), torch.randn(2, 5, 12, dtype=torch.float64)
        options = {"use_cayley_neumann": False, **theirs}
        other, values = with_peft(layer, peft.OFTConfig(target_modules=["0"], **options), 0.1)
        # PEFT's default series belongs to the transpose of its exact rotation: that of -Q.
        sign = -1 if options["use_cayley_neumann"] else 1
        alike(layer, dk.OFT(at="0", **ours), {"skew": sign * values["oft_R"]}, other, x)


def test_both_branches_rotate_in_the_same_direction():
    """In PEFT the series is that of the transposed rotation: a file that is read with the other one turns backwards."""
    layer, x = linear(12, 7), torch.randn(2, 5, 12, dtype=torch.float64)
    found = {}
    values = 0.05 * torch.randn(3, 6, dtype=torch.float64)
    for cayley in ("exact", "neumann"):
        model = nn.Sequential(layer).eval()
        delta = dk.attach(model, dk.OFT(at="0", block_size=4, cayley=cayley, terms=9))
        delta.load_state_dict({"0.oft.skew": values})
        found[cayley] = model(x)
        delta.detach()
    assert not torch.allclose(layer(x), found["exact"], atol=1e-2)
    torch.testing.assert_close(found["exact"], found["neumann"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "block"), [(12, 12), (64, 32), (96, 32), (74, 2), (7, 7), (37, 37)])
def test_default_blocks(size, block):
    model = nn.Sequential(nn.Linear(size, 3))
    (module,) = dk.attach(model, dk.OFT(at="0")).modules["0"]
    assert module.block_size == block
    assert module.skew.shape == (size // block, block * (block - 1) // 2)
    assert f"block_size={block}" in repr(dk.deltas(model)[0])


def test_an_image_is_rotated_in_its_channels():
    """PEFT sums overlapping patches of an image, so that even its untrained OFT changes a convolution of more than one pixel."""
    layer, x = nn.Conv2d(6, 5, 3, padding=1).double(), torch.randn(2, 6, 7, 11, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    bare = model(x)
    delta = dk.attach(model, dk.OFT(at="0", block_size=3))
    assert torch.equal(model(x), bare)
    other, _ = with_peft(layer, peft.OFTConfig(target_modules=["0"], oft_block_size=3), 0)
    assert not torch.allclose(other(x), bare, atol=0.1)
    with torch.no_grad():
        (values,) = delta.parameters()
        values.add_(torch.randn_like(values))
        turn = torch.block_diag(*[torch.eye(3, dtype=torch.float64) + one for one in delta.modules["0"][0].turn()])
        expected = layer._conv_forward(torch.einsum("dc,bchw->bdhw", turn, x), layer.weight, layer.bias)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.OFT(block_size=4, blocks=3), r"OFT\(block_size=4, blocks=3\): omit one of the two"),
        (lambda: dk.OFT(block_size=1), r"OFT\(block_size=1\): expected at least 2 features; 32 is usual"),
        (lambda: dk.OFT(blocks=0), r"OFT\(blocks=0\): expected at least 1"),
        (lambda: dk.OFT(terms=3), r"OFT\(terms=3\): expected at least 4; 5 is usual"),
        (lambda: dk.OFT(cayley="series"), r"OFT\(cayley='series'\)"),
    ],
)
def test_bad_options(unchecked, make, message):
    with pytest.raises(dk.OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_size": 5},
            r"^0: OFT\(block_size=5\) does not divide its 12 features; use block_size=4, or leave it out",
        ),
        (
            {"blocks": 7},
            r"^0: OFT\(blocks=7\) does not divide its 12 features; use blocks=6, or leave it out with exclude=",
        ),
        ({"blocks": 12}, r"^0: OFT\(block_size=1\) does not divide its 12 features; use block_size=2"),
    ],
)
def test_blocks_that_do_not_fit(options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.attach(nn.Sequential(nn.Linear(12, 7)), dk.OFT(at="0", **options))


def test_part_of_a_fused_projection_is_refused():
    model = build("gpt2")
    assert all(path.endswith("c_attn") for path in dk.attach(model, dk.OFT()).modules)
    with pytest.raises(dk.TargetError, match="OFT changes the input, which all parts of a fused projection share"):
        dk.attach(model, dk.OFT(at="c_attn[q]"), name="other")


def test_it_has_no_sum():
    model = nn.Sequential(nn.Linear(12, 7))
    delta = attached(model, dk.OFT(at="0"))
    with pytest.raises(dk.TargetError, match="OFT is not linear in its parameters"):
        dk.combine(model, {delta: 1.0})
