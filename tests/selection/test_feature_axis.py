"""On which dimension norms and convolutions have their features, and deltas that stand on it."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.changed_weights import check_against_changed_weights
from support.models import randomize


class ChannelsFirstNorm(nn.LayerNorm):
    """Norms of convolutional models permute for torch's layer norm, and back (SqueezeBERT, ConvNeXt)."""

    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


# As many positions as features: an axis that is mistaken shows in the values only.
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda: nn.BatchNorm1d(6), (3, 6, 6)),
        (lambda: nn.BatchNorm2d(5), (3, 5, 5, 5)),
        (lambda: nn.GroupNorm(2, 6), (3, 6, 6)),
        (lambda: nn.InstanceNorm2d(6, affine=True), (3, 6, 6, 6)),
        (lambda: ChannelsFirstNorm(6), (3, 6, 6)),
        (lambda: nn.LayerNorm(6), (6, 6, 6)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else type(value()).__name__,
)
def test_a_bias_on_norms_stands_on_their_features(norm, shape):
    x = torch.randn(shape).double()
    check_against_changed_weights(nn.Sequential(norm()).double().eval(), lambda m: m(x), dk.BitFit(at="0"), ["0"])


def test_an_adapter_behind_a_convolution_works_on_its_channels():
    model = nn.Sequential(nn.Conv2d(3, 5, 1)).double()
    delta = randomize(dk.attach(model, dk.Adapter(size=2, at="0", activation="tanh")))
    (adapter,) = delta.modules["0"]
    x = torch.randn(2, 3, 5, 7).double()
    y = nn.functional.conv2d(x, model[0].weight, model[0].bias)
    h = torch.tanh(torch.einsum("bchw,rc->brhw", y, adapter.down.weight) + adapter.down.bias[:, None, None])
    update = torch.einsum("brhw,cr->bchw", h, adapter.up.weight) + adapter.up.bias[:, None, None]
    torch.testing.assert_close(model(x), y + update)


def test_an_adapter_on_other_features_than_it_was_told_is_an_error():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x[..., :4]

    model = nn.Sequential(Block())
    model[0].weight = nn.Parameter(torch.ones(6))
    dk.attach(model, dk.Adapter(size=2, at="0"))
    with pytest.raises(dk.TargetError, match=r"has shape \(2, 4\): expected 6 features at dimension -?1, found 4"):
        model(torch.ones(2, 6))
