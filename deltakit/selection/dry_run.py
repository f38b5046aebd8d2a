"""Dry-run copies: small modules whose forward can be called to see how the original treats shapes and features."""

import copy
from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import projection_sizes


def dry_run(module: nn.Module) -> nn.Module:
    """Returns a dry-run copy: same class, same attributes, cheap weights.

    Its linear layers return ones, and its other weights are ones. It computes in float64 on the CPU. The original is not
    changed and its large weights are not copied, so it may be on any device, the meta device included.
    """
    sizes = projection_sizes(module)
    if sizes is not None:
        return Ones(sizes[1])
    # No constructor and no deepcopy: the constructor's arguments are unknown, and a deepcopy would copy the weights.
    new = module.__class__.__new__(module.__class__)
    new.__dict__ = dict(module.__dict__)
    # The copy must not run the hooks of the original, which may be those of deltas or of accelerate.
    for table in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        new.__dict__[table] = OrderedDict()
    new.__dict__["training"] = False
    new.__dict__["_parameters"] = {n: None if p is None else _ones_like(p) for n, p in module._parameters.items()}
    new.__dict__["_buffers"] = {n: None if b is None else _on_cpu(b) for n, b in module._buffers.items()}
    new.__dict__["_modules"] = {n: None if c is None else dry_run(c) for n, c in module._modules.items()}
    config = module.__dict__.get("config")
    if config is not None and hasattr(config, "_attn_implementation"):
        # Flash and flex kernels refuse float64 or the CPU; eager attention runs everywhere.
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        new.__dict__["config"] = config
    return new


def _ones_like(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.ones(parameter.shape, dtype=torch.float64), requires_grad=False)


def _on_cpu(buffer: Tensor) -> Tensor:
    # A buffer on the meta device has no values. Most buffers here are masks, and a mask of ones hides nothing.
    buffer = torch.ones(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.cpu()
    return buffer.double() if buffer.is_floating_point() else buffer


class Ones(nn.Module):
    """Replaces a linear layer whose values do not matter: it returns ones of the layer's output size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        # Many forwards read `layer.weight.dtype`.
        self.weight = torch.ones((), dtype=torch.float64)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return x.new_ones(*x.shape[:-1], self.size)
