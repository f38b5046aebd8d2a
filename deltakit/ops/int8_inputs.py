"""Activations kept in a quarter of float32's bytes: one byte a value, and one scale a token."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor


def packed(x: Float[Tensor, "tokens d"]) -> tuple[Int8[Tensor, "tokens d"], Float[Tensor, "tokens 1"]]:
    """The values as whole numbers from -127 to 127, and what one of them is worth in each token.

    >>> values, scale = packed(torch.tensor([[1.0, -2.0, 0.5]]))
    >>> values.tolist(), torch.allclose(unpacked(values, scale), torch.tensor([[1.0, -2.0, 0.5]]), atol=scale.item() / 2)
    ([[64, -127, 32]], True)
    """
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / 127
    return (x / scale).round_().to(torch.int8), scale


def packed_once(x: Float[Tensor, "*batch d"]) -> tuple[Tensor, Tensor]:
    """`packed`, once for all that take the same input, as queries, keys and values do: it goes with the tensor."""
    kept = getattr(x, "_deltakit_packed", None)
    if kept is None or kept[0] != x._version:
        kept = (x._version, *packed(x.reshape(-1, x.shape[-1])))
        x._deltakit_packed = kept  # type: ignore[attr-defined]
    return kept[1], kept[2]


def unpacked(values: Int8[Tensor, "tokens d"], scale: Float[Tensor, "tokens 1"]) -> Float[Tensor, "tokens d"]:
    """What `packed` was given, up to half a step of its scale."""
    return values.to(scale.dtype) * scale
