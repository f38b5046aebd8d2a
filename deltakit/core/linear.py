"""Linear layers by what they are, not by their class: torch's, transformers' Conv1D, and quantised ones."""

import sys

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`: a linear layer whose weight is [d_in, d_out]."""
    # Whoever has one has imported its file.
    file = sys.modules.get("transformers.pytorch_utils")
    return file is not None and isinstance(module, file.Conv1D)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """The input and output size of a linear layer; None for any other module.

    >>> linear_sizes(nn.Linear(5, 7)), linear_sizes(nn.ReLU())
    ((5, 7), None)
    """
    weight = getattr(module, "weight", None)
    if is_conv1d(module) and isinstance(weight, Tensor):
        return int(weight.shape[0]), int(weight.shape[1])
    # By the attributes: quantised linear layers are no subclasses of nn.Linear.
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


def projection_sizes(module: nn.Module) -> tuple[int, int] | None:
    """The input and output size of what maps each position alone: a linear layer or a convolution of kernel size 1.

    >>> projection_sizes(nn.Conv1d(5, 7, 1)), projection_sizes(nn.Conv1d(5, 7, 3))
    ((5, 7), None)
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        pointwise = set(module.kernel_size) == {1} and set(module.stride) == {1}
        return (module.in_channels, module.out_channels) if pointwise else None
    return linear_sizes(module)


def is_compute_dtype(dtype: torch.dtype) -> bool:
    """Whether a dtype is one to compute in: in fewer than 16 bits floating-point numbers are quantised weights.

    >>> is_compute_dtype(torch.bfloat16), is_compute_dtype(torch.float8_e4m3fn), is_compute_dtype(torch.int8)
    (True, False, False)
    """
    return dtype.is_floating_point and dtype.itemsize > 1


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that: what merging computes in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
