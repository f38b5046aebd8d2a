"""Merging into quantised weights, by the quantiser that the user gives, and what its rounding loses."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import dequantized, is_quantized, linear_sizes
from deltakit.errors import TargetError

Quantize = Callable[[nn.Linear], Any]


class Rounded(NamedTuple):
    """The squared norms of what rounding lost, and of the update."""

    lost: float
    whole: float


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
    before = dequantized(layer, dtype)
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
    made_of_it, twin = dequantized(copy.deepcopy(made), dtype), copy.deepcopy(layer)
    original = twin._parameters["weight"]
    twin._parameters["weight"] = copy.deepcopy(weight)
    after = dequantized(twin, dtype)
    twin._parameters["weight"] = original
    used = (after - made_of_it).norm() <= 0.1 * (made_of_it - before).norm()
    if not used or not torch.equal(dequantized(twin, dtype), before):
        raise TargetError(
            f"{path}: this {type(layer).__name__} does not compute with the weight that quantize= made as the layer does that "
            "quantize= made, or not with its own again when that is put back; is it quantised in another way, or does it keep "
            "a copy of its weight? Leave the delta attached"
        )
    weight.requires_grad_(False)
    layer._parameters["weight"] = weight
    return Rounded(float((after - wanted).square().sum()), float(update.square().sum()))
