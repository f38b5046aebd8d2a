"""How far the values of one tensor are from those of another of the same shape."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltakit.core import gathered, is_quantized, wide


class ValueChange(NamedTuple):
    """The largest absolute difference, and ||b - a|| / ||a||. None if they are not known, or `a` is zero."""

    largest: float | None
    relative: float | None


@torch.no_grad()
def value_change(a: Tensor, b: Tensor) -> ValueChange | None:
    """Returns how far `b` is from `a`; None if they are equal. Where both are not a number, they are equal.

    Packed weights are compared as they are stored, so only whether they differ is known. Values on the meta device are not
    known at all, unless both are the same tensor. The difference is computed where `b` is.
    """
    if a is b:
        return None
    a, b = gathered(a).detach(), gathered(b).detach()
    if a.is_meta or b.is_meta or _is_packed(a) or _is_packed(b):
        return None if _same_bits(a, b) else ValueChange(None, None)
    here, there = (_as_floats(side) for side in (a.to(b.device), b))
    if torch.equal(here, there):
        return None
    equal = (here == there) | (here.isnan() & there.isnan())
    change = torch.where(equal, torch.zeros_like(there), there - here).abs()
    largest, norm = float(change.max()), float(here.norm())
    return ValueChange(largest, float(change.norm()) / norm if norm else None) if not bool(equal.all()) else None


def _as_floats(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor
    # float64, because float32 does not hold all integers beyond 2^24.
    return wide(tensor) if tensor.is_floating_point() else tensor.double()


def _is_packed(tensor: Tensor) -> bool:
    # Of plain tensors only integers are packed; buffers of integers and booleans have values that mean something.
    return is_quantized(tensor) and (
        type(tensor) not in (Tensor, torch.nn.Parameter) or isinstance(tensor, torch.nn.Parameter)
    )


def _same_bits(a: Any, b: Any) -> bool:
    if a.is_meta or b.is_meta or type(a) is not type(b) or a.dtype != b.dtype:
        return False
    if type(a) in (Tensor, torch.nn.Parameter):
        # Not all dtypes of packed weights can be compared, but their bytes can.
        a, b = (side.contiguous().flatten().view(torch.uint8) for side in (a, b.to(a.device)))
    try:
        return bool(torch.equal(a, b))
    except (RuntimeError, NotImplementedError, TypeError):
        # A class of tensors that cannot be compared: they may differ.
        return False
