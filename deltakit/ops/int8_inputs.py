"""Stores activations for the backward pass in a quarter of float32's memory: one byte per value and one scale per token."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor


def packed(x: Float[Tensor, "tokens d"]) -> tuple[Int8[Tensor, "tokens d"], Float[Tensor, "tokens 1"]]:
    """Returns the values as integers from -127 to 127, and for each token the value of one unit.

    >>> values, scale = packed(torch.tensor([[1.0, -2.0, 0.5]]))
    >>> values.tolist(), torch.allclose(unpacked(values, scale), torch.tensor([[1.0, -2.0, 0.5]]), atol=scale.item() / 2)
    ([[64, -127, 32]], True)
    """
    # In float32 at least: a scale that is rounded to 16 bits would make integers above 127, which are negative in 8 bits.
    largest = x.abs().amax(-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
    scale = largest.clamp_min(torch.finfo(largest.dtype).tiny * 127) / 127
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def packed_once(x: Float[Tensor, "*batch d"]) -> tuple[Int8[Tensor, "tokens d"], Float[Tensor, "tokens 1"]]:
    """Returns the same as `packed`, and computes it once for all layers with the same input, such as query, key and value."""
    # A leaf may be a buffer that the user fills again for each batch, in ways that torch does not count (numpy, `.data`).
    if x.grad_fn is None:
        return packed(x.reshape(-1, x.shape[-1]))
    # It is kept as an attribute of the tensor, so it lives exactly as long as the input.
    kept = getattr(x, "_deltakit_packed", None)
    if kept is None or kept[0] != x._version:
        kept = (x._version, *packed(x.reshape(-1, x.shape[-1])))
        x._deltakit_packed = kept  # type: ignore[attr-defined]
    return kept[1], kept[2]


def unpacked(values: Int8[Tensor, "tokens d"], scale: Float[Tensor, "tokens 1"]) -> Float[Tensor, "tokens d"]:
    """Returns the values before `packed`, rounded by up to half a unit of their scale."""
    return values.to(scale.dtype) * scale
