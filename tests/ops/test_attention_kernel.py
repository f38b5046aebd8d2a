"""Keys, values and masks with a prefix in front."""

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.ops.attention.kernel import prepend


def test_each_rows_prefix_is_repeated_for_groups_of_queries():
    prefix, own = torch.randn(3, 2, 5, 4), torch.randn(3, 6, 7, 4)
    both = prepend(prefix, own, nn.Identity())
    assert torch.equal(both[:, :, 5:], own)
    for head in range(6):
        assert torch.equal(both[:, head, :5], prefix[:, head // 3])
    assert torch.equal(prepend(prefix, own.flatten(0, 1), nn.Identity()), both.flatten(0, 1))


@pytest.mark.parametrize("own", [(2, 6, 7, 4), (3, 5, 7, 4), (3, 6, 7, 5), (17, 7, 4)])
def test_rows_prefixes_that_do_not_fit_are_an_error(unchecked, own):
    with pytest.raises(
        dk.StateError, match=r"Identity: prefixes of shape \(3, 2, 5, 4\) do not fit keys or values of shape"
    ):
        prepend(torch.randn(3, 2, 5, 4), torch.randn(own), nn.Identity())
