"""Deltas on `nn.MultiheadAttention` and torch's own encoder, which read weights without calling the layers that hold them."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.changed_weights import changed_by_hand, check_against_changed_weights
from support.models import randomize


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)

    def forward(self, x, other):
        return self.attention(x, other[0], other[1])[0]


@pytest.mark.parametrize(
    "method", [dk.LoRA(r=2, at="@attn.{q,k,v,o}"), dk.BitFit(at="@attn.{q,k,v,o}")], ids=lambda m: m.name
)
@pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 5}], ids=["fused", "unequal"])
@pytest.mark.parametrize("training", [False, True])
def test_torch_attention(options, training, method):
    model = Attends(**options).double().train(training)
    x = torch.randn(2, 3, 12).double()
    other = [torch.randn(2, 4, options.get(name, 12)).double() for name in ("kdim", "vdim")]
    names = [f"{c}_proj_weight" for c in "qkv"] if options else [f"in_proj_weight[{c}]" for c in "qkv"]
    check_against_changed_weights(
        model, lambda m: m(x, other), method, [f"attention.{name}" for name in (*names, "out_proj")]
    )


def test_the_fast_path_of_torch_does_not_pass_a_delta_by():
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 12)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at=["@attn.{q,o}", "@ff.{up,down}"])))
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x))
    torch.testing.assert_close(fast, changed_by_hand(model, delta)(x))
    assert [
        m.weight_read is not None
        for m in (delta.modules["layers.0.linear1"][0], delta.modules["layers.0.self_attn.out_proj"][0])
    ] == [False, True]


def test_torch_s_attention_as_the_backbone():
    model = nn.MultiheadAttention(12, 3, batch_first=True)
    delta = randomize(dk.attach(model, dk.LoRA(r=2)))
    assert sorted(delta.modules) == ["in_proj_weight[q]", "in_proj_weight[v]"]
    model(*[torch.randn(2, 5, 12)] * 3)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())


@pytest.mark.parametrize(
    "method", [dk.LoRA(r=2), dk.BitFit(), dk.Adapter(size=2), dk.Prefix(tokens=2)], ids=lambda m: m.name
)
def test_padded_batches_in_torch_s_encoder(method):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, dropout=0), 2).eval()
    x, pad = torch.randn(2, 5, 24), torch.tensor([[0, 0, 0, 1, 1], [0] * 5]).bool()
    delta = randomize(dk.attach(model, method), 0.05)
    with torch.no_grad():
        padded = model(x, src_key_padding_mask=pad)
        torch.testing.assert_close(padded[:1, :3], model(x[:1, :3]))
    assert model(x, src_key_padding_mask=pad).requires_grad
    delta.detach()
    assert model.use_nested_tensor is True


def test_an_encoder_without_nested_tensors_stays_without():
    """Detaching must put back what the user chose, and no default."""
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    dk.attach(model, dk.LoRA(r=2)).detach()
    assert model.use_nested_tensor is False
