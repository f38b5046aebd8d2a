"""Adds LoRA's product to an output: y + s x A^T B^T.

A hook with the plain formula takes as long as PEFT (measured). Three changes make this one faster:

- No tensor of the output's size is made: the product is added in place to the output that the layer has just made.
- One autograd node computes the gradients of the frozen layer and of the delta, and saves only x and x A^T; with a frozen A
  (LoRA-FA) only x A^T.
- The product x A^T has the layout [r, tokens]. With so few columns, [tokens, r] takes more than twice the time on a CPU.

The plain formula runs where these are not possible: while compiling or tracing, under autocast and functional transforms, in
dispatch modes, and for tensor subclasses.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltakit.core import is_conv1d
from deltakit.errors import StateError
from deltakit.ops.fast_paths import frozen_weight, only_plain
from deltakit.ops.int8_inputs import packed_once, unpacked
from deltakit.ops.low_rank_plain import Product, compiled, plain

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
# As in `fast_paths`.
_is_compiling, _autocast = torch.compiler.is_compiling, torch._C._is_any_autocast_enabled


def add_low_rank(
    y: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_part r"],
    product: Product,
    layer: nn.Module | None = None,
    alone: bool = False,
) -> Float[Tensor, "*batch d_out"]:
    """Returns y with the product added.

    Args:
        layer: the linear layer that computed y from x, if y may be changed in place.
        alone: whether y is still exactly that layer's output, so that one autograd node can serve layer and delta.
    """
    # Factors of another dtype are cast to x's. Casting x to theirs, as PEFT does, would copy and save the larger tensor:
    # 13.4 MB of activations instead of 3.3 in bfloat16 (measured).
    if _is_compiling():
        return compiled(y, x, a, b, product)
    if only_plain(x, y, a):
        return plain(y, x, a, b, product)
    graph = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or a.requires_grad or b.requires_grad)
    if not graph:
        h = a.to(x.dtype) @ x.reshape(-1, x.shape[-1]).mT
        h = h if product.tokens is None else _only(product.tokens, h)
        return _added(y if layer is not None else y.clone(), h, b.to(x.dtype), product)
    weight = frozen_weight(layer, x, y) if alone else None
    flipped = weight is not None and layer is not None and is_conv1d(layer)
    given = y if weight is None else y.detach()
    return _LowRank.apply(given, x, a, b, weight, flipped, layer is not None, product)


def convolved(
    y: Float[Tensor, "*out_shape"],
    x: Float[Tensor, "*in_shape"],
    a: Float[Tensor, "r channels *kernel"],
    b: Float[Tensor, "d_out r"],
    product: Product,
    layer: nn.Module,
) -> Float[Tensor, "*out_shape"]:
    """Returns y with the product of a convolution added: A with the layer's own geometry, then B with kernel size 1.

    `channels` are those of one group. A is applied to each group of input channels, and the rows of B for its output
    channels follow. Together this is the convolution with the weight B A.
    """
    layer_any: Any = layer
    kernel = a.ndim - 2
    down = a.repeat(layer_any.groups, *[1] * (kernel + 1))
    h = layer_any._conv_forward(x.to(a.dtype), down, None) * product.scale
    return y + _CONVOLUTIONS[kernel - 1](h, b[(..., *[None] * kernel)], groups=layer_any.groups).to(y.dtype)


def _only(tokens: Bool[Tensor, "*batch"], h: Float[Tensor, "r tokens"]) -> Float[Tensor, "r tokens"]:
    """Returns h with zeros for the tokens that the product is not added to."""
    return h.masked_fill(~tokens.reshape(-1), 0)


def _added(
    y: Float[Tensor, "*batch d_out"], h: Float[Tensor, "r tokens"], b: Float[Tensor, "d_part r"], product: Product
) -> Float[Tensor, "*batch d_out"]:
    rows = y.view(-1, y.shape[-1])
    part = rows if b.shape[0] == rows.shape[1] else rows.narrow(1, product.start, b.shape[0])
    part.mT.addmm_(b, h, alpha=product.scale)
    return y


class _LowRank(torch.autograd.Function):
    """The sum, with its gradients written by hand.

    With `weight`, y is the output of the frozen layer detached from x, and this node also computes the layer's gradient for
    x. That saves one tensor of the input's size and one addition.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        a: Float[Tensor, "r d_in"],
        b: Float[Tensor, "d_part r"],
        weight: Float[Tensor, "_ _"] | None,
        flipped: bool,
        in_place: bool,
        product: Product,
    ) -> Float[Tensor, "*batch d_out"]:
        ctx.flipped, ctx.product, ctx.shape = flipped, product, x.shape
        rows = x.reshape(-1, x.shape[-1])
        h = a.to(x.dtype) @ rows.mT
        h = h if product.tokens is None else _only(product.tokens, h)
        # x is only needed for A's gradient. A delta with a frozen A does not save it.
        kept = (x,) if product.keep == "exact" else packed_once(x)
        # As in the layer itself, only the gradient of x needs the weight.
        held = weight if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(h, a, b, held, *(kept if ctx.needs_input_grad[2] else ()))
        # In place is safe: a linear layer's backward does not need its output, and nobody else has it (`fresh`).
        out = _added(y if in_place else y.clone(), h, b.to(x.dtype), product)
        # An input that is returned as it is becomes a view that nothing may change in place, so `nn.ReLU(inplace=True)` behind
        # the layer would fail. Detached, it is a tensor of its own on the same memory, with the same version counter.
        return out.detach() if in_place else out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if not _autocast():
            return _gradients(ctx, g)
        # The forward ran without autocast: under it the plain formula is taken.
        with torch.autocast(g.device.type, enabled=False):
            return _gradients(ctx, g)


def _gradients(ctx: Any, g: Tensor) -> Any:
    h, a, b, weight, *kept = ctx.saved_tensors
    product: Product = ctx.product
    needs_y, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
    again = torch.is_grad_enabled()
    if again and product.keep != "exact":
        raise StateError(
            f"second derivatives need the exact inputs, but LoRA(keep={product.keep!r}) rounded them; use keep='exact'"
        )
    if again and not kept and needs_x and needs_b:
        # B's gradient depends on x by h, and the saved h has no graph.
        raise StateError(
            "second derivatives need the inputs of the layer, which a low-rank update with a frozen A does not keep; train A "
            "(LoRA(frozen_a=False)), or freeze the embeddings, so that no input requires gradients"
        )
    low, high = a.to(g.dtype), b.to(g.dtype)
    rows = (kept[0] if len(kept) == 1 else unpacked(*kept).to(g.dtype)).reshape(-1, ctx.shape[-1]) if kept else None
    if again and rows is not None:
        # The saved h has no graph. Second derivatives go through x and A, so h is computed again from them.
        h = low @ rows.mT
        h = h if product.tokens is None else _only(product.tokens, h)
    whole = g.reshape(-1, g.shape[-1])
    part = whole if high.shape[0] == whole.shape[1] else whole.narrow(1, product.start, high.shape[0])
    gh = (high.mT @ part.mT) * product.scale
    gh = gh if product.tokens is None else _only(product.tokens, gh)
    gx = ga = gb = None
    if needs_a and rows is not None:
        ga = (gh @ rows).to(a.dtype)
    if needs_b:
        gb = (h @ part).mul(product.scale).mT.to(b.dtype)
    if needs_x:
        gx = whole @ (weight.mT if ctx.flipped else weight) if weight is not None else None
        gx = gh.mT @ low if gx is None else gx.addmm_(gh.mT, low)
        gx = gx.view(ctx.shape)
    return g if needs_y else None, gx, ga, gb, None, None, None, None
