"""The product that LoRA adds to an output, at the cost of its arithmetic: y + s x A^T B^T.

All that is special for speed stands here and is the plain formula in other words. Measured against a hook with that formula,
three things pay. No tensor of the output's size is made: the product is added into the output that the layer has just made.
One node of the graph gives the gradients of the frozen layer and of the delta together, and keeps only x and x A^T. And the
small factors are laid out [r, tokens]: products with so few columns then run along the long side of memory, in less than
half the time on a CPU. Where any of it may not be done, the plain formula runs: while compiling or tracing, under autocast
and functional transforms, and on tensors of other classes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from deltakit.core import is_conv1d
from deltakit.errors import StateError
from deltakit.ops.int8_inputs import packed_once, unpacked

_FEW = 16
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
# Torch's hooks on all modules, which see an output before any other.
_EVERYWHERE = torch.nn.modules.module._global_forward_hooks

# By their names here: each is asked in each call of each target. For functional transforms torch has no public question.
_is_compiling, _is_tracing, _autocast = torch.compiler.is_compiling, torch.jit.is_tracing, torch.is_autocast_enabled  # type: ignore[attr-defined]
_transforms = torch._C._are_functorch_transforms_active


class Product(NamedTuple):
    """What is added: `scale` x A^T B^T, to the features from `start` on. `keep`: how x is kept for the backward pass."""

    scale: float
    start: int = 0
    keep: str = "exact"


def add_low_rank(
    y: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_part r"],
    product: Product,
    layer: nn.Module | None = None,
    alone: bool = False,
) -> Float[Tensor, "*batch d_out"]:
    """y with the product added.

    `layer`: the linear layer that made y of x; then y itself may be changed. `alone`: y is what it made, and no more.

    Factors of another dtype than x's are cast to it, and not x to theirs: they are small, and x would be copied.
    """
    if _only_plain(x, y, a):
        return plain(y, x, a, b, product)
    graph = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or a.requires_grad or b.requires_grad)
    if not graph:
        h = a.to(x.dtype) @ x.reshape(-1, x.shape[-1]).mT
        return _added(y if layer is not None else y.clone(), h, b.to(x.dtype), product)
    weight = _frozen_weight(layer, x, y) if alone else None
    flipped = weight is not None and layer is not None and is_conv1d(layer)
    given = y if weight is None else y.detach()
    return _LowRank.apply(given, x, a, b, weight, flipped, layer is not None, product)


def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, product: Product) -> Tensor:
    """The formula as it is written, for whatever tensors there are."""
    update = F.linear(F.linear(x, a.to(x.dtype)) * product.scale, b.to(x.dtype))
    if update.shape[-1] != y.shape[-1]:
        update = F.pad(update, (product.start, y.shape[-1] - product.start - update.shape[-1]))
    return y + update.to(y.dtype)


def _only_plain(x: Tensor, y: Tensor, a: Tensor) -> bool:
    return (
        _is_compiling()
        or type(x) is not Tensor
        or type(y) is not Tensor
        or type(a) not in (nn.Parameter, Tensor)
        or x.dtype is not y.dtype
        or not y.is_contiguous()
        or _autocast(y.device.type)
        or _transforms()
        or _is_tracing()
        or forward_ad._current_level >= 0
    )


def add_few_tokens(target: nn.Module, delta: Any, x: Tensor, y: Tensor, scale: float) -> Tensor | None:
    """y with the product of the delta's factors added in place, for a token or a few without gradients (decoding).

    There the calls cost more than the arithmetic, and these are the fewest. Everything that must be asked is asked here, what
    rules it out most often first. None if one of the answers does, so that the caller takes the usual way.
    """
    # Whether it compiles comes before the number of tokens: a guard on that number would cost a second graph.
    if torch.is_grad_enabled() or _is_compiling() or x.numel() > _FEW * x.shape[-1] or _must_be_called(delta):
        return None
    a, b = delta.factors()
    if a.dtype is not x.dtype or _only_plain(x, y, a) or fresh(target, delta)[0] is None:
        return None
    return y.add_(F.linear(F.linear(x, a), b), alpha=scale)


def convolved(
    y: Tensor, x: Tensor, a: Tensor, b: Float[Tensor, "d_out r"], product: Product, layer: nn.Module
) -> Tensor:
    """y with the product of a convolution added: A [r, channels of a group, *kernel] with the layer's own geometry, then B
    with kernel size 1.

    Each group has A of its own input and its own rows of B; both together are the convolution with the weight B A.
    """
    layer_any: Any = layer
    kernel = a.ndim - 2
    down = a.repeat(layer_any.groups, *[1] * (kernel + 1))
    h = layer_any._conv_forward(x.to(a.dtype), down, None) * product.scale
    return y + _CONVOLUTIONS[kernel - 1](h, b[(..., *[None] * kernel)], groups=layer_any.groups).to(y.dtype)


def _must_be_called(delta: nn.Module) -> bool:
    """Whether it must go through `__call__`, so that hooks of FSDP2 and accelerate bring its parameters in."""
    return bool(delta._forward_pre_hooks or delta._forward_hooks or "forward" in delta.__dict__)


def _frozen_weight(layer: nn.Module | None, x: Tensor, y: Tensor) -> Tensor | None:
    """The weight of a layer of which y has no other history than x: its gradients are taken in the same node."""
    if layer is None or not (x.requires_grad or not y.requires_grad):
        return None
    if "weight" in layer.__dict__ or "bias" in layer.__dict__:
        # It computed with a sum of another delta, which has gradients of its own.
        return None
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype is not x.dtype:
        return None
    return weight if bias is None or not bias.requires_grad else None


def _added(y: Tensor, h: Tensor, b: Tensor, product: Product) -> Tensor:
    rows = y.view(-1, y.shape[-1])
    part = rows if b.shape[0] == rows.shape[1] else rows.narrow(1, product.start, b.shape[0])
    part.mT.addmm_(b, h, alpha=product.scale)
    return y


class _LowRank(torch.autograd.Function):
    """The sum, and its gradients by hand. With `weight`, y is the frozen layer's output cut off from x, and the layer's
    own gradient is taken here too: one tensor of the input's size less, and one addition less."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        flipped: bool,
        in_place: bool,
        product: Product,
    ) -> Tensor:
        ctx.flipped, ctx.product, ctx.shape = flipped, product, x.shape
        rows = x.reshape(-1, x.shape[-1])
        h = a.to(x.dtype) @ rows.mT
        kept = (x,) if product.keep == "exact" else packed_once(x)
        ctx.save_for_backward(h, a, b, weight, *(kept if ctx.needs_input_grad[2] else ()))
        # The layer does not need its output, and nobody else has it: see `fresh`.
        return _added(y if in_place else y.clone(), h, b.to(x.dtype), product)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        h, a, b, weight, *kept = ctx.saved_tensors
        product: Product = ctx.product
        needs_y, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        again = torch.is_grad_enabled()
        if again and product.keep != "exact":
            raise StateError(
                f"second derivatives need the input itself, and LoRA(keep={product.keep!r}) kept less of it"
            )
        low, high = a.to(g.dtype), b.to(g.dtype)
        rows = (kept[0] if len(kept) == 1 else unpacked(*kept)).reshape(-1, ctx.shape[-1]) if kept else None
        if again and rows is not None:
            # For second derivatives h must be the function of x and A that it is.
            h = low @ rows.mT
        whole = g.reshape(-1, g.shape[-1])
        part = whole if high.shape[0] == whole.shape[1] else whole.narrow(1, product.start, high.shape[0])
        gh = (high.mT @ part.mT) * product.scale
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


def fresh(target: nn.Module, delta: nn.Module) -> tuple[nn.Module | None, bool]:
    """The target, if it is a plain linear layer whose output nobody else holds when the delta gets it, else None; and
    whether that output is as the layer made it.

    Earlier hooks may hold the output or have replaced it; other low-rank deltas leave it as good as new.
    """
    if not (type(target) is nn.Linear or is_conv1d(target)) or "forward" in target.__dict__ or _EVERYWHERE:
        return None, False
    # Not `next` with a default, which torch 2.6 cannot trace.
    hooks = list(target._forward_hooks.values())
    hook = hooks[0] if hooks else None
    keys = getattr(hook, "delta_keys", ())
    alone = True
    for key in keys:
        held = target._modules.get(key)
        if held is delta:
            return target, alone
        if type(held) is not type(delta):
            break
        alone = False
    return None, False
