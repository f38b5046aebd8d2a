"""What sizes and dtypes a target works with, read from its weights: no forward is needed."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deltakit.core import Target, is_compute_dtype, linear_sizes, own_modules
from deltakit.errors import TargetError


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
        return linear[0], target.feature_slice.size if target.feature_slice else linear[1]
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
    if getattr(target.module, "is_transposed", False):
        # transformers' expert modules say whether their stacks are [in, out].
        out, d_in = d_in, out
    return d_in, target.feature_slice.size if target.feature_slice else out


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


def input_size(target: Target, method: str) -> int:
    """The size of the features that a target takes, in elements: of a linear map, a convolution (its channels), a norm.

    Raises:
        TargetError: if the structure does not tell, or it takes ids.
    """
    module = target.module
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels
    if linear_sizes(module) is not None and not target.parameter:
        return sizes(target, method)[0]
    if isinstance(module, nn.Embedding):
        raise TargetError(
            f"{target.path}: {method} changes the features that a module takes, and an embedding takes ids; leave it out with "
            "exclude="
        )
    return output_size(target, method)


def dtype_of(target: Target) -> torch.dtype:
    """The floating-point dtype that a target computes in: its weight's; where that is quantised the module's
    `compute_dtype`, that of its other tensors (a bias, scales), or that of the parameters nearest around it.

    Raises:
        TargetError: if its weights are quantised and nothing says what it computes in.
    """
    tensors = _tensors(target)
    if not tensors:
        raise TargetError(
            f"{target.path}: a {type(target.module).__name__} has no parameters: its dtype and device are unknown; "
            "expected a module with weights"
        )
    for dtype in _dtypes(target):
        if isinstance(dtype, torch.dtype) and is_compute_dtype(dtype):
            return dtype
    if target.parameter:
        raise TargetError(
            f"{target.path}: expected a parameter in floating point of at least 16 bits to add an update to, found "
            f"{tensors[0].dtype}; name the module around it, whose output is in floating point"
        )
    raise TargetError(
        f"{target.path}: the weight of this {type(target.module).__name__} is {tensors[0].dtype} and it has no "
        "compute_dtype: the dtype of its output is unknown; expected a floating-point output"
    )


def _dtypes(target: Target) -> Iterator[object]:
    """What may say the dtype that a target computes in, the surest first."""
    if target.parameter:
        yield from (tensor.dtype for tensor in _tensors(target))
        return
    modules = [module for _, module in own_modules(target.module)]
    for module in modules:
        own = [parameter.dtype for parameter in module._parameters.values() if parameter is not None]
        yield from (*own[:1], getattr(module, "compute_dtype", None), *own[1:])
    # Packed weights are buffers, and so are what goes with them.
    yield from (buffer.dtype for module in modules for buffer in _saved_buffers(module))
    yield target.around


def like(target: Target) -> dict[str, Any]:
    """The dtype and device that a delta module for a target is built with, as keyword arguments of torch's factories.

    Raises:
        TargetError: if the target has no weights, or quantised ones and nothing says what it computes in.
    """
    weight = target.module._parameters.get(target.parameter or "weight")
    if (
        weight is not None
        and is_compute_dtype(weight.dtype)
        and not (weight.is_meta and hasattr(target.module, "_hf_hook"))
    ):
        # As nearly always, and for each target: nothing else needs to be looked at.
        return {"dtype": weight.dtype, "device": weight.device}
    return {"dtype": dtype_of(target), "device": _device_of(target)}


def _device_of(target: Target) -> torch.device:
    """The device that a target computes on: its weight's, or the one to which accelerate brings an offloaded weight."""
    device = _tensors(target)[0].device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for _, module in own_modules(target.module))
    parts = (part for hook in hooks for part in getattr(hook, "hooks", (hook,)))
    found = (getattr(part, "execution_device", None) for part in parts)
    return next((torch.device(place) for place in found if place is not None), device)


def _tensors(target: Target) -> list[torch.Tensor]:
    """The parameter that a target is, or all parameters at and below it, and then all saved buffers."""
    own = target.module._parameters.get(target.parameter) if target.parameter else None
    if own is not None:
        return [own]
    modules = [module for _, module in own_modules(target.module)]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    return [*parameters, *(buffer for module in modules for buffer in _saved_buffers(module))]


def _saved_buffers(module: nn.Module) -> list[torch.Tensor]:
    left_out = module._non_persistent_buffers_set
    return [buffer for name, buffer in module._buffers.items() if buffer is not None and name not in left_out]
