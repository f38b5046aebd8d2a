"""LoRA and BitFit on convolutions of every kind."""

import copy

import pytest
import torch
from torch import nn

import deltakit as dk
from support.changed_weights import check_against_changed_weights

CONVOLUTIONS = [
    nn.Conv1d(6, 9, 3),
    nn.Conv1d(6, 9, 3, groups=3, stride=2, padding=2),
    nn.Conv1d(8, 8, 4, groups=8, padding=3),
    nn.Conv2d(6, 10, (3, 2), groups=2, stride=(2, 1), dilation=(1, 2), padding="valid"),
    nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(6, 10, 3, padding="same", padding_mode="reflect", groups=2),
    nn.Conv3d(4, 6, 2, groups=2, padding=1),
]


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_convolutions(convolution):
    model = nn.Sequential(copy.deepcopy(convolution)).double()
    x = torch.randn(2, convolution.in_channels, *[7, 8, 6][: len(convolution.kernel_size)]).double()
    check_against_changed_weights(model, lambda m: m(x), dk.LoRA(r=3, at="0"), ["0"])
    check_against_changed_weights(model, lambda m: m(x), dk.BitFit(at="0"), ["0"])


class Causal(nn.Conv1d):
    """A convolution that pads itself."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))


def test_a_convolution_with_a_forward_of_its_own_is_adapted_by_a_weight_patch():
    x = torch.randn(2, 6, 3).double()
    check_against_changed_weights(nn.Sequential(Causal(6, 5, 3)).double(), lambda m: m(x), dk.LoRA(r=2, at="0"), ["0"])
