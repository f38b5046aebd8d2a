"""Merges into quantized weights with the user's quantizer, and measures what rounding loses."""

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
    """The squared norms of the rounding error and of the update."""

    lost: float
    whole: float


def merge_quantized(
    layer: nn.Module, update: Float[Tensor, "d_out d_in"], dtype: torch.dtype, quantize: Quantize, *, path: str
) -> Rounded:
    """Replaces the layer's weight by the quantized sum of weight and update, and returns the rounding error.

    Args:
        dtype: the dtype that the layer computes in.
        quantize: quantizes an `nn.Linear` in place, or returns another layer.
        path: the layer's path, for error messages.

    Raises:
        TargetError: if the module is not a linear layer, `quantize` returns no quantized weight, or the layer does not
            compute with that weight.
    """
    sizes = linear_sizes(layer)
    if sizes is None or update.shape != (sizes[1], sizes[0]):
        raise TargetError(
            f"{path}: expected a quantized linear layer of size {update.shape[1]} to {update.shape[0]} to merge into, found a "
            f"{type(layer).__name__}; leave the delta attached"
        )
    before = dequantized(layer, dtype)
    wanted = before + update.to(before)
    sum_of_both = nn.Linear(*sizes, bias=False, dtype=dtype, device=before.device).requires_grad_(False)
    sum_of_both.weight.copy_(wanted)
    made = quantize(sum_of_both)
    made = sum_of_both if made is None else made
    weight = getattr(made, "weight", None)
    if not isinstance(weight, Tensor) or tuple(sizes) != linear_sizes(made):
        raise TargetError(
            f"{path}: quantize= returned a {type(made).__name__}, and expected is a linear layer of size {sizes[0]} to "
            f"{sizes[1]}; let it quantize the linear layer that it gets, in place or by returning another layer"
        )
    if not isinstance(weight, nn.Parameter) or not is_quantized(weight):
        raise TargetError(
            f"{path}: quantize= left the weight in {weight.dtype}; let it quantize the linear layer that it gets, in place or "
            "by returning another layer"
        )
    # On copies, because some layers split their weight in their first call and keep the parts (bitsandbytes in 8 bits).
    made_of_it, twin = dequantized(copy.deepcopy(made), dtype), copy.deepcopy(layer)
    original = twin._parameters["weight"]
    twin._parameters["weight"] = copy.deepcopy(weight)
    after = dequantized(twin, dtype)
    twin._parameters["weight"] = original
    used = (after - made_of_it).norm() <= 0.1 * (made_of_it - before).norm()
    if not used or not torch.equal(dequantized(twin, dtype), before):
        raise TargetError(
            f"{path}: this {type(layer).__name__} does not compute with the weight that quantize= returned: it may be "
            "quantized in another way, or keep a copy of its own weight; quantize it alike, or leave the delta attached"
        )
    weight.requires_grad_(False)
    layer._parameters["weight"] = weight
    return Rounded(float((after - wanted).square().sum()), float(update.square().sum()))
