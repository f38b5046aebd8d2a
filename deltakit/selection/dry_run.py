"""Stand-ins: modules of the same class as one of the backbone's, to run its forward and see what it does with shapes."""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from deltakit.core import projection_sizes


def dry_run(module: nn.Module) -> nn.Module:
    """A module of the same class and attributes, whose linear layers give ones and whose other weights are ones.

    It computes in float64 on the CPU. Nothing of the original is touched, and nothing large is copied: the original may be
    on any device, or on none.
    """
    sizes = projection_sizes(module)
    if sizes is not None:
        return Ones(sizes[1])
    new = module.__class__.__new__(module.__class__)
    new.__dict__ = dict(module.__dict__)
    for table in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        new.__dict__[table] = OrderedDict()
    new.__dict__["training"] = False
    new.__dict__["_parameters"] = {n: None if p is None else _filled(p) for n, p in module._parameters.items()}
    new.__dict__["_buffers"] = {n: None if b is None else _plain(b) for n, b in module._buffers.items()}
    new.__dict__["_modules"] = {n: None if c is None else dry_run(c) for n, c in module._modules.items()}
    config = module.__dict__.get("config")
    if config is not None and hasattr(config, "_attn_implementation"):
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        new.__dict__["config"] = config
    return new


def _filled(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.ones(parameter.shape, dtype=torch.float64), requires_grad=False)


def _plain(buffer: Tensor) -> Tensor:
    # A buffer on the meta device has no values: a mask of ones hides nothing.
    buffer = torch.ones(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.cpu()
    return buffer.double() if buffer.is_floating_point() else buffer


class Ones(nn.Module):
    """Stands for a linear layer that does not matter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        # Forwards ask for the dtype of the weight.
        self.weight = torch.ones((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(*x.shape[:-1], self.size)
