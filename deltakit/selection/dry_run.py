"""Dry-run copies: small modules whose forward can be called to see how the original treats shapes and features."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import is_compute_dtype, own_children, projection_sizes, wrapped_layer


def dry_run(module: nn.Module, device: str = "cpu") -> nn.Module:
    """Returns a dry-run copy: same class, same attributes, cheap weights, without deltas and hooks.

    Its linear layers return ones, and its other weights are ones. It computes in float64 on the CPU. The original is not
    changed and its large weights are not copied, so it may be on any device, the meta device included.

    Args:
        device: "cpu", or "meta" to compute shapes only. There, linear layers keep their forward, unless they are quantized.
    """
    wrapped = wrapped_layer(module)
    if wrapped is not None:
        return dry_run(wrapped, device)
    sizes = projection_sizes(module)
    if sizes is not None and not (device == "meta" and _has_plain_weight(module)):
        return Ones(sizes[1])
    # No constructor and no deepcopy: the constructor's arguments are unknown, and a deepcopy would copy the weights.
    new = module.__class__.__new__(module.__class__)
    new.__dict__ = dict(module.__dict__)
    # The copy must not run the hooks of the original, which may be those of deltas or of the user. It is called without
    # global hooks, and without the original's compiled forward, which would compute with the original's weights.
    new.__dict__.pop("forward", None)
    new.__dict__["_compiled_call_impl"] = MethodType(forward_of(module), new)
    for table in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        new.__dict__[table] = OrderedDict()
    new.__dict__["training"] = False
    new.__dict__["_parameters"] = {
        n: None if p is None else _ones_like(p, device) for n, p in module._parameters.items()
    }
    new.__dict__["_buffers"] = {n: None if b is None else _on(device, b) for n, b in module._buffers.items()}
    # Without deltas: a prefix in the copy would add keys and values to the attention that is measured.
    empty = {name: None for name, child in module._modules.items() if child is None}
    new.__dict__["_modules"] = {**empty, **{name: dry_run(child, device) for name, child in own_children(module)}}
    config = module.__dict__.get("config")
    if config is not None and hasattr(config, "_attn_implementation"):
        # Flash and flex kernels refuse float64 or the CPU; eager attention runs everywhere.
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        new.__dict__["config"] = config
    return new


def _has_plain_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and is_compute_dtype(weight.dtype)


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """Returns the function that computes a module's forward, without what accelerate wraps around it."""
    # accelerate replaces `forward` by a partial for the original module, and keeps what it replaced.
    own = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    # Anything but a method of the module itself cannot be called for a copy of it.
    return own.__func__ if isinstance(own, MethodType) and own.__self__ is module else type(module).forward


def _ones_like(parameter: Tensor, device: str) -> nn.Parameter:
    return nn.Parameter(torch.ones(parameter.shape, dtype=torch.float64, device=device), requires_grad=False)


def _on(device: str, buffer: Tensor) -> Tensor:
    # A buffer on the meta device has no values. Most buffers here are masks, and a mask of ones hides nothing.
    if buffer.is_meta:
        buffer = torch.ones(buffer.shape, dtype=buffer.dtype, device=device)
    buffer = buffer.to(device)
    return buffer.double() if buffer.is_floating_point() else buffer


class Ones(nn.Module):
    """Replaces a linear layer whose values do not matter: it returns ones of the layer's output size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        # Many forwards read `layer.weight.dtype`.
        self.weight = torch.ones((), dtype=torch.float64)

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        # Without global hooks.
        return self.forward(x)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return x.new_ones(*x.shape[:-1], self.size)
