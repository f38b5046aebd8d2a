"""Weighted sums of delta modules that are linear in one parameter."""

from collections.abc import Sequence

import torch
from torch import nn

from deltakit.core import DeltaModule, wide


@torch.no_grad()
def take_weighted_sum(module: nn.Module, name: str, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
    """Sets a parameter of a delta module to the weighted sum of the parameters with its name in the parts.

    Returns:
        The squared truncation error, which is 0, and the squared norm of the sum: what `DeltaModule.take_sum` returns.
    """
    total = torch.stack([weight * wide(part.get_parameter(name)) for weight, part in parts]).sum(0)
    module.get_parameter(name).copy_(total)
    return 0.0, float(total.square().sum())
