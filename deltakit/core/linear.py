"""Recognises linear layers by their attributes instead of their class: torch's, transformers' Conv1D, quantized ones."""

import sys

import torch
from jaxtyping import Float
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether a module is transformers' `Conv1D`: a linear layer whose weight is [d_in, d_out]."""
    # A model with a Conv1D has imported this file already, so deltakit need not import transformers.
    file = sys.modules.get("transformers.pytorch_utils")
    return file is not None and isinstance(module, file.Conv1D)


def is_exactly_conv1d(module: nn.Module) -> bool:
    """Returns whether a module is transformers' `Conv1D`, and no subclass, which may compute something else."""
    file = sys.modules.get("transformers.pytorch_utils")
    return file is not None and type(module) is file.Conv1D


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Returns the input and output size of a linear layer; None for any other module.

    >>> linear_sizes(nn.Linear(5, 7)), linear_sizes(nn.ReLU())
    ((5, 7), None)
    """
    if is_conv1d(module):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            return int(weight.shape[0]), int(weight.shape[1])
    # Quantized linear layers are often not subclasses of nn.Linear, but they have its attributes.
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


def projection_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Returns the input and output size of a map of single positions: a linear layer or a convolution of kernel size 1.

    It is None for any other module.

    >>> projection_sizes(nn.Conv1d(5, 7, 1)), projection_sizes(nn.Conv1d(5, 7, 3))
    ((5, 7), None)
    """
    if isinstance(module, _CONVOLUTIONS):
        pointwise = set(module.kernel_size) == {1} and set(module.stride) == {1}
        return (module.in_channels, module.out_channels) if pointwise else None
    return linear_sizes(module)


def is_compute_dtype(dtype: torch.dtype) -> bool:
    """Returns whether a dtype is floating point of at least 16 bits; narrower ones only store quantized weights.

    >>> is_compute_dtype(torch.bfloat16), is_compute_dtype(torch.float8_e4m3fn), is_compute_dtype(torch.int8)
    (True, False, False)
    """
    return dtype.is_floating_point and dtype.itemsize > 1


def wide(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns the tensor in float32, or in float64 if it is float64: the dtypes that merging computes in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
