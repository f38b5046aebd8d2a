"""Merging into quantised weights, by the quantiser that the user gives, and what its rounding loses."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import is_compute_dtype, linear_sizes, wide
from deltakit.errors import TargetError

Quantize = Callable[[nn.Linear], Any]


class Rounded(NamedTuple):
    """The squared norms of what rounding lost, and of the update."""

    lost: float
    whole: float


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is held as something else than plain numbers that one computes with."""
    return type(weight) not in (Tensor, nn.Parameter) or not is_compute_dtype(weight.dtype)


def merge_quantized(
    layer: nn.Module, update: Float[Tensor, "d_out d_in"], dtype: torch.dtype, quantize: Quantize, *, path: str
) -> Rounded:
    """Puts the weight with an update, quantised again, on the layer; how far it is off. `dtype`: what the layer computes in.

    Raises:
        TargetError: if the module is no linear layer, the quantiser gives no quantised weight, or the layer does not use it.
    """
    sizes = linear_sizes(layer)
    if sizes is None or update.shape != (sizes[1], sizes[0]):
        raise TargetError(
            f"{path}: expected a quantised linear layer of {update.shape[1]} to {update.shape[0]} to merge into, found a "
            f"{type(layer).__name__}; leave the delta attached"
        )
    before = _values(layer, sizes[0], dtype)
    wanted = before + update.to(before)
    sum_of_both = nn.Linear(*sizes, bias=False, dtype=dtype, device=before.device).requires_grad_(False)
    sum_of_both.weight.copy_(wanted)
    made = quantize(sum_of_both)
    made = sum_of_both if made is None else made
    weight = made.weight
    if not isinstance(weight, nn.Parameter) or not is_quantized(weight):
        raise TargetError(
            f"{path}: quantize= left the weight as it is, in {weight.dtype}; expected it to quantise a linear layer"
        )
    # On copies, for some layers take their weight apart when they are first called, and keep it (bitsandbytes in 8 bits).
    made_of_it, twin = _values(copy.deepcopy(made), sizes[0], dtype), copy.deepcopy(layer)
    original = twin._parameters["weight"]
    twin._parameters["weight"] = copy.deepcopy(weight)
    after = _values(twin, sizes[0], dtype)
    twin._parameters["weight"] = original
    used = (after - made_of_it).norm() <= 0.1 * (made_of_it - before).norm()
    if not used or not torch.equal(_values(twin, sizes[0], dtype), before):
        raise TargetError(
            f"{path}: this {type(layer).__name__} does not compute with the weight that quantize= made as the layer does that "
            "quantize= made, or not with its own again when that is put back; is it quantised in another way, or does it keep "
            "a copy of its weight? Leave the delta attached"
        )
    weight.requires_grad_(False)
    layer._parameters["weight"] = weight
    return Rounded(float((after - wanted).square().sum()), float(update.square().sum()))


def _values(layer: nn.Module, d_in: int, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """What the layer computes with, in float32 or wider: what its forward, without hooks, makes of each unit vector."""
    units = torch.eye(d_in, dtype=dtype, device=layer.weight.device)  # type: ignore[arg-type]
    made, bias = layer.forward(units), getattr(layer, "bias", None)
    return wide(made if bias is None else made - bias).mT
