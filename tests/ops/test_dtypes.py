"""In which dtype a delta computes at a target."""

import pytest
import torch
from torch import nn

from deltakit.core import Target
from deltakit.ops import like


class Quantized(nn.Module):
    def __init__(self, *others, compute_dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
        for number, dtype in enumerate(others):
            self.register_parameter(f"other_{number}", nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False))
        if compute_dtype is not None:
            self.compute_dtype = compute_dtype


@pytest.mark.parametrize(
    ("module", "around", "wanted"),
    [
        (nn.Linear(2, 2, dtype=torch.half), torch.float32, torch.half),
        (Quantized(torch.half, compute_dtype=torch.bfloat16), torch.float32, torch.bfloat16),
        (Quantized(torch.half), torch.float32, torch.half),
        (Quantized(torch.int8, torch.half), torch.float32, torch.half),
        (Quantized(), torch.float32, torch.float32),
    ],
)
def test_the_surest_of_what_says_a_dtype(module, around, wanted):
    assert like(Target("a", module, around=around))["dtype"] is wanted
