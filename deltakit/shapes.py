"""What sizes and dtypes a target works with, read from its weights: no forward is needed."""

import math
from typing import Any

import torch
from torch import nn

from deltakit.errors import TargetError
from deltakit.linears import linear_sizes
from deltakit.method import Target


def sizes(target: Target, method: str) -> tuple[int, int]:
    """The input and output size of a linear map: Linear-like, Conv1D, Embedding (ids to features), Conv1d to Conv3d
    (channels in one group times kernel size, and channels), or a parameter with its last dimension as the input.

    Raises:
        TargetError: if the module is no such map.
    """
    module = target.module
    if target.parameter:
        return _parameter_sizes(target, method)
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels
    linear = linear_sizes(module)
    if linear is not None:
        return linear[0], target.rows.size if target.rows else linear[1]
    own = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim > 1]
    named = f", or the parameter '{target.path}.{own[0]}'" if own and target.path else ""
    raise TargetError(
        f"{target.path or 'the backbone'}: {method} serves Linear, Conv1D, Embedding and Conv1d to Conv3d, found "
        f"{type(module).__name__}; narrow with of= or exclude=, or name a module inside it{named}"
    )


def _parameter_sizes(target: Target, method: str) -> tuple[int, int]:
    tensor = target.module._parameters[target.parameter]
    if tensor is None or tensor.ndim < 2:
        raise TargetError(
            f"{target.path}: {method} on a parameter expects a matrix, or a stack of matrices, found shape "
            f"{tuple(tensor.shape) if tensor is not None else ()}; leave it out with exclude="
        )
    out, d_in = (int(size) for size in tensor.shape[-2:])
    return d_in, target.rows.size if target.rows else out


def output_size(target: Target, method: str) -> int:
    """The size of the features that a target gives, in elements: of a linear map, a norm, or the block around it.

    Raises:
        TargetError: if the structure does not tell.
    """
    module = target.module
    if target.parameter:
        raise TargetError(
            f"{target.path}: {method} changes what a module gives, and this is a parameter; name the module around it"
        )
    if linear_sizes(module) is not None or isinstance(module, nn.Embedding):
        return sizes(target, method)[1]
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 1:
        return weight.numel()
    if target.width is not None:
        return target.width
    raise TargetError(
        f"{target.path or 'the backbone'}: cannot tell the size of what a {type(module).__name__} gives; {method} "
        "expects a linear map, a norm, or a part of a block; name a module inside it"
    )


def dtype_of(target: Target) -> torch.dtype:
    """The floating-point dtype that a target computes in: its weight's, or the one it is quantised for.

    Raises:
        TargetError: if its weights are integers and it does not say what it computes in.
    """
    parameters = _weights(target)
    if not parameters:
        raise TargetError(
            f"{target.path}: a {type(target.module).__name__} has no parameters: its dtype and device are unknown; "
            "expected a module with weights"
        )
    for dtype in (parameters[0].dtype, getattr(target.module, "compute_dtype", None)):
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    raise TargetError(
        f"{target.path}: the weight of this {type(target.module).__name__} is {parameters[0].dtype} and it has no "
        "compute_dtype: the dtype of its output is unknown; expected a floating-point output"
    )


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 if it is that: what merging computes in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def like(target: Target) -> dict[str, Any]:
    """The dtype and device that a delta module for a target is built with, as keyword arguments of torch's factories.

    Raises:
        TargetError: if the target has no weights, or integer ones without saying what it computes in.
    """
    return {"dtype": dtype_of(target), "device": _weights(target)[0].device}


def _weights(target: Target) -> list[nn.Parameter]:
    own = target.module._parameters.get(target.parameter) if target.parameter else None
    return [own] if own is not None else list(target.module.parameters())
