"""Low-rank updates in operations that torch itself differentiates, transforms and compiles: y + s x A^T B^T.

`plain` works for all tensors. `compiled` is for code that is being compiled: on a CPU it has another layout. There is no
autograd function in it, because torch's own gradients have the fast layout, too, if the products are written as here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_autocast = torch._C._is_any_autocast_enabled
# Not found out by the import, which older torch cannot trace.
_TELLS_UNKNOWN = torch.__version__ >= "2.8"


class Product(NamedTuple):
    """The options of the product: its `scale`, the first output feature it is added to, and how x is saved for backward.

    `keep` is "exact" or "int8". `tokens` says to which tokens it is added; None for all.
    """

    scale: float
    start: int = 0
    keep: str = "exact"
    tokens: Bool[Tensor, "*batch"] | None = None


def plain(
    y: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_part r"],
    product: Product,
) -> Float[Tensor, "*batch d_out"]:
    """Returns y with the product added, by the plain formula, which works for all tensors."""
    h = F.linear(x, a.to(x.dtype)) * product.scale
    if product.tokens is not None:
        h = h.masked_fill(~product.tokens[..., None], 0)
    update = F.linear(h, b.to(x.dtype))
    # Not by `shape`, which nested tensors do not have.
    if update.size(-1) != y.size(-1):
        update = F.pad(update, (product.start, y.size(-1) - product.start - update.size(-1)))
    return y + update.to(y.dtype)


def compiled(
    y: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_part r"],
    product: Product,
) -> Float[Tensor, "*batch d_out"]:
    """Returns y with the product added, for code that is being compiled.

    With inductor on a CPU, the plain formula costs a training step 0.9 of PEFT's overhead, and this one about half of it
    (measured): the products and, by the strides of the factors, their gradients have the layout [r, tokens].
    """
    if _other(y, x, b, product):
        return plain(y, x, a, b, product)
    low, high = a.to(x.dtype), b.to(x.dtype)
    if x.numel() == x.shape[-1] and not torch.is_grad_enabled() and x.dtype in (torch.float32, torch.float64):
        # One token: inductor fuses products with vectors with what stands around them, and calls MKL for the others.
        return torch.addmv(y.reshape(-1), high, low.mv(x.reshape(-1)) * product.scale).view(y.shape)
    h = (low @ x.reshape(-1, x.shape[-1]).mT) * product.scale
    # B^T is copied because torch chooses the form of a gradient by strides: from a view of B, B's own would be
    # [d_out, tokens] @ [tokens, r], which takes four to nine times as long as [r, tokens] @ [tokens, d_out] (512 tokens).
    return torch.addmm(y.reshape(-1, y.shape[-1]), h.mT, high.mT.contiguous()).view(y.shape)


def _other(y: Tensor, x: Tensor, b: Tensor, product: Product) -> bool:
    """Returns whether code that is being compiled needs the plain formula, or does not gain by another."""
    # A tensor subclass may be sharded along a dimension that the view [tokens, d_in] would merge. Autocast would cast y.
    if (
        type(x) is not Tensor
        or type(y) is not Tensor
        or x.dtype is not y.dtype
        or x.device.type != "cpu"
        or b.shape[0] != y.shape[-1]
        or product.tokens is not None
        or _autocast()
    ):
        return True
    if not _TELLS_UNKNOWN:
        return True
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    # A number of tokens that depends on values (`x[mask]`, experts) is unknown while compiling, and views of such tensors ask
    # about it. Only then do the two answers differ.
    empty = x.numel() == 0
    return bool(guard_or_true(empty) and not guard_or_false(empty))
