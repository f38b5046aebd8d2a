"""Glorot's start values with OpenDelta's gain."""

import math

from torch import Tensor, nn


def glorot_uniform(tensor: Tensor) -> Tensor:
    """Fills a matrix [d_out, d_in] with uniform numbers of variance 4 / (d_in + d_out), and returns it."""
    return nn.init.xavier_uniform_(tensor, gain=math.sqrt(2))


def glorot_normal(tensor: Tensor) -> Tensor:
    """Fills a matrix [d_out, d_in] with normal numbers of variance 4 / (d_in + d_out), and returns it."""
    return nn.init.xavier_normal_(tensor, gain=math.sqrt(2))
