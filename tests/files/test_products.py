"""Products of tensors from files are bounded by what the files hold."""

from pathlib import Path

import pytest
import torch

import deltakit as dk
from deltakit.files.formats.products import product


def test_a_product_is_that_of_torch():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 5, 7)
    assert torch.equal(product(a, b, Path("there")), a @ b)


@pytest.mark.parametrize("shapes", [((1, 50_000, 1), (1, 1, 50_000)), ((10_000, 1), (1, 10_000))])
def test_a_column_times_a_row_is_refused(shapes):
    a, b = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(dk.CheckpointError, match=r"there is damaged: .* have a product of [\d,]+ values"):
        product(a, b, Path("there"))


@pytest.mark.parametrize("shapes", [((3,), (3, 2)), ((2, 3), (2, 3)), ((), (2, 3))])
def test_tensors_that_do_not_fit(shapes):
    a, b = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(dk.CheckpointError, match="there: tensors of shapes .* do not fit each other"):
        product(a, b, Path("there"))
