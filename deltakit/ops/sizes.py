"""Reads a target's sizes, dtype and device from its weights. No forward is needed."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from deltakit.core import Target, is_compute_dtype, join, linear_sizes, own_children, own_modules
from deltakit.errors import TargetError
from deltakit.selection import output_features

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def sizes(target: Target, method: str) -> tuple[int, int]:
    """Returns the input and output size of a linear map.

    That is a linear layer, an embedding (vocabulary and features), a convolution (channels of a group times the size of the
    kernel, and channels), or a parameter [*stack, d_out, d_in].

    Args:
        method: the name of the method, for the error message.

    Raises:
        TargetError: if the target is not one of these.
    """
    module = target.module
    if target.parameter:
        return _parameter_sizes(target, method)
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, _CONVOLUTIONS):
        return module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels
    linear = linear_sizes(module)
    if linear is not None:
        return linear[0], target.feature_slice.size if target.feature_slice else linear[1]
    own = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim > 1]
    named = f", or the parameter '{join(target.path, own[0])}'" if own else ""
    raise TargetError(
        f"{target.named}: {method} works on Linear, Conv1D, Embedding and Conv1d to Conv3d, found "
        f"{type(module).__name__}; leave it out with of= or exclude=, or select a module inside it{named}"
    )


def matrix_sizes(target: Target, method: str) -> tuple[int, int]:
    """Returns the numbers of input and output features of a linear map, or of channels of a convolution.

    Args:
        method: the name of the method, for the error message.

    Raises:
        TargetError: if it is neither a linear layer, an embedding, a convolution nor a parameter with a matrix.
    """
    d_in, d_out = sizes(target, method)
    return d_in // math.prod(kernel_of(target)), d_out


def kernel_of(target: Target) -> torch.Size:
    """Returns the size of a convolution's kernel; () for other targets."""
    module = target.module
    if not isinstance(module, _CONVOLUTIONS) or target.parameter:
        return torch.Size()
    return torch.Size(module.kernel_size)


def stack_of(target: Target) -> tuple[int, ...]:
    """Returns the dimensions before the matrix of a parameter: (8,) for 8 experts; () for one matrix and for modules."""
    held = target.module._parameters.get(target.parameter)
    return tuple(held.shape[:-2]) if held is not None else ()


def matrix_shape(target: Target, method: str) -> tuple[tuple[int, ...], int, int]:
    """Returns the shape of a target's weight as matrices: `stack_of` it, d_out, and d_in with the positions of a kernel.

    Args:
        method: the name of the method, for the error message.

    Raises:
        TargetError: if the target is none of those of `sizes`, or an embedding: its ids are no features.
    """
    if isinstance(target.module, nn.Embedding):
        raise TargetError(
            f"{target.named}: {method} changes maps of features, but an embedding takes ids; leave it out with exclude="
        )
    d_in, d_out = sizes(target, method)
    return stack_of(target), d_out, d_in


def largest_sizes(targets: Sequence[Target], method: str) -> tuple[int, int]:
    """Returns the largest input size and the largest output size of these linear maps.

    Args:
        method: the name of the method, for the error message.

    Raises:
        TargetError: if a target is no linear map.
    """
    each = [sizes(target, method) for target in targets]
    return max(d_in for d_in, _ in each), max(d_out for _, d_out in each)


def _parameter_sizes(target: Target, method: str) -> tuple[int, int]:
    tensor = target.module._parameters[target.parameter]
    if tensor is None or tensor.ndim < 2:
        raise TargetError(
            f"{target.named}: {method} on a parameter expects a matrix, or a stack of matrices, found shape "
            f"{tuple(tensor.shape) if tensor is not None else ()}; leave it out with exclude="
        )
    out, d_in = (int(size) for size in tensor.shape[-2:])
    if getattr(target.module, "is_transposed", False):
        # transformers' expert modules say whether their stacks are [in, out].
        out, d_in = d_in, out
    return d_in, target.feature_slice.size if target.feature_slice else out


def output_size(target: Target, method: str) -> int:
    """Returns the number of features in a target's output.

    It is read from the target itself (a linear map or a norm) or from the block around it.

    Args:
        method: the name of the method, for the error message.

    Raises:
        TargetError: if the target is a parameter, or the structure does not show the number.
    """
    module = target.module
    if target.parameter:
        raise TargetError(
            f"{target.named}: {method} changes the output of a module, but this is a parameter; select the module around it"
        )
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        inside = [
            join(target.path, name)
            for name, child in own_children(module)
            if next(child.parameters(), None) is not None
        ]
        raise TargetError(
            f"{target.named}: {method} cannot be on an nn.Sequential, which would call the delta module as one of its own; "
            f"select a module in it{f', such as {inside[-1]}' if inside else ''}"
        )
    if linear_sizes(module) is not None or isinstance(module, nn.Embedding):
        return sizes(target, method)[1]
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 1:
        return weight.numel()
    # BERT's `intermediate` has more features than the block around it: what a single layer in a part gives counts.
    alone = _single_layer(module)
    if alone is not None and (target.width is None or not _has_matrix_beside(module, alone)):
        size: tuple[int, int] = linear_sizes(alone)  # type: ignore[assignment]
        return size[1]
    if target.width is not None:
        return target.width
    measured = output_features(module) if any(own_children(module)) else None
    if measured is not None:
        return measured[1]
    raise TargetError(
        f"{target.named}: the structure does not show the output size of this {type(module).__name__}; "
        f"{method} works on linear layers, norms and parts of a block; select one of these"
    )


def _single_layer(module: nn.Module) -> nn.Module | None:
    """Returns the only linear layer in a module without convolutions, else None."""
    inside = [part for _, part in own_modules(module)]
    layers = [part for part in inside if linear_sizes(part) is not None]
    convolved = any(isinstance(part, nn.modules.conv._ConvNd) for part in inside)
    return layers[0] if len(layers) == 1 and not convolved else None


def _has_matrix_beside(module: nn.Module, layer: nn.Module) -> bool:
    """Returns whether a module has matrices besides its only linear layer, which then need not compute its output.

    PhiMoE's feed-forward part has one layer, the router, and parameters with the matrices of all experts.
    """
    own = {id(parameter) for parameter in layer.parameters()}
    return any(
        parameter is not None and parameter.ndim > 1 and id(parameter) not in own
        for _, part in own_modules(module)
        if not isinstance(part, nn.Embedding)
        for parameter in part._parameters.values()
    )


def input_size(target: Target, method: str) -> int:
    """Returns the number of features in a target's input: of a linear map, a convolution (its channels) or a norm.

    Args:
        method: the name of the method, for the error message.

    Raises:
        TargetError: if the target is an embedding or a parameter, or the structure does not show the number.
    """
    module = target.module
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels
    if linear_sizes(module) is not None and not target.parameter:
        return sizes(target, method)[0]
    if isinstance(module, nn.Embedding):
        raise TargetError(
            f"{target.named}: {method} changes the input features of a module, but an embedding takes ids; leave it out with "
            "exclude="
        )
    return output_size(target, method)


def dtype_of(target: Target) -> torch.dtype:
    """Returns the floating-point dtype that a target computes in.

    That is the dtype of its weight. If the weight is quantized, it is the module's `compute_dtype`, the dtype of its other
    tensors (a bias, scales), or the dtype of the nearest parameters around it.

    Raises:
        TargetError: if the target has no weights, or they are quantized and none of these is known.
    """
    tensors = _tensors(target)
    if not tensors:
        raise TargetError(
            f"{target.named}: a {type(target.module).__name__} has no parameters, so its dtype and device are unknown; "
            "select a module with weights"
        )
    for dtype in _dtypes(target):
        if isinstance(dtype, torch.dtype) and is_compute_dtype(dtype):
            return dtype
    if target.parameter:
        raise TargetError(
            f"{target.named}: expected a parameter in floating point of at least 16 bits to add an update to, found "
            f"{tensors[0].dtype}; select the module around it, whose output is in floating point"
        )
    raise TargetError(
        f"{target.named}: the weight of this {type(target.module).__name__} is {tensors[0].dtype} and it has no "
        "compute_dtype, so the dtype of its output is unknown; set its compute_dtype, such as torch.bfloat16"
    )


def _dtypes(target: Target) -> Iterator[object]:
    """Yields what may be the dtype that a target computes in, the most reliable first."""
    if target.parameter:
        yield from (tensor.dtype for tensor in _tensors(target))
        return
    modules = [module for _, module in own_modules(target.module)]
    for module in modules:
        own = [parameter.dtype for parameter in module._parameters.values() if parameter is not None]
        yield from (*own[:1], getattr(module, "compute_dtype", None), *own[1:])
    # Packed weights and their scales are buffers.
    yield from (buffer.dtype for module in modules for buffer in _saved_buffers(module))
    yield target.around


def like(target: Target) -> dict[str, Any]:
    """Returns the dtype and device for a target's delta module, as keyword arguments of torch's factories.

    Raises:
        TargetError: if the target has no weights, or they are quantized and its dtype is unknown.
    """
    weight = target.module._parameters.get(target.parameter or "weight")
    if weight is not None:
        dtype, device = weight.dtype, weight.device
        if is_compute_dtype(dtype) and not (device.type == "meta" and hasattr(target.module, "_hf_hook")):
            # The usual case. Attaching calls this for every target, so it avoids the walk over all tensors.
            return {"dtype": dtype, "device": device}
    return {"dtype": dtype_of(target), "device": _device_of(target)}


def _device_of(target: Target) -> torch.device:
    """Returns the device that a target computes on: its weight's, or accelerate's execution device if it is offloaded."""
    device = _tensors(target)[0].device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for _, module in own_modules(target.module))
    parts = (part for hook in hooks for part in getattr(hook, "hooks", (hook,)))
    found = (getattr(part, "execution_device", None) for part in parts)
    return next((torch.device(known) for known in found if known is not None), device)


def _tensors(target: Target) -> list[torch.Tensor]:
    """Returns the target's parameter, or all parameters at and below its module and then all saved buffers."""
    own = target.module._parameters.get(target.parameter) if target.parameter else None
    if own is not None:
        return [own]
    modules = [module for _, module in own_modules(target.module)]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    return [*parameters, *(buffer for module in modules for buffer in _saved_buffers(module))]


def _saved_buffers(module: nn.Module) -> list[torch.Tensor]:
    left_out = module._non_persistent_buffers_set
    return [buffer for name, buffer in module._buffers.items() if buffer is not None and name not in left_out]
