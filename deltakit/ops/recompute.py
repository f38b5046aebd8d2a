"""Products with a full weight update, and other formulas, that are recomputed in the backward pass.

Some methods compute a full matrix [d_out, d_in] for each layer (LoHa, FourierFT). Saved for the backward pass, these would
take as much memory as the backbone's weights.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from deltakit.core import is_conv1d
from deltakit.ops.low_rank import frozen_weight, only_plain
from deltakit.ops.module_copy import ComputedBy


def linear_with(
    x: Float[Tensor, "*batch d_in"], build: Callable[..., Tensor], parameters: tuple[Tensor, ...]
) -> Float[Tensor, "*batch d_out"]:
    """Returns `F.linear(x, build(*parameters))`. Only x is saved for the backward pass, not the matrix.

    Args:
        build: returns the matrix [d_out, d_in] that it computes from the parameters. It is called again in the backward pass,
            with aliases of them, and reads no other tensors that require gradients. For a formula of a delta module, pass
            `ComputedBy(self, lambda own: ...)`.
        parameters: what `build` reads; of a `ComputedBy`, its `tensors()`.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _transformed():
        return F.linear(x, build(*parameters).to(x.dtype))
    return _Recomputed.apply(x, build, None, *parameters)


def _transformed() -> bool:
    """Whether a transform of torch.func runs, or forward-mode differentiation: they take no gradients by hand."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def recomputed(formula: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns `formula(*inputs)`. Only the inputs are saved for the backward pass, where the formula is computed again.

    Args:
        formula: draws no random numbers and reads no other tensors that require gradients.
    """
    plain = not torch.is_grad_enabled() or torch.compiler.is_compiling() or _transformed()
    # A trace cannot hold a function with a backward pass, and inference tensors cannot be saved for one.
    if plain or torch._C._is_tracing() or any(one.is_inference() for one in inputs):
        return formula(*inputs)
    out: Tensor = _Again.apply(formula, *inputs)
    return out


class _Again(torch.autograd.Function):
    """A formula that is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(*inputs)
        return formula(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        again = torch.is_grad_enabled()
        inputs = _aliases(ctx.saved_tensors, needed)
        asked = [one for one, need in zip(inputs, needed, strict=True) if need]
        with torch.enable_grad():
            out = ctx.formula(*inputs)
        found = iter(torch.autograd.grad(out, asked, g, create_graph=again))
        return None, *(next(found) if need else None for need in needed)


def _aliases(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Returns what stands for the tensors of the forward when a formula is computed again.

    The gradients of the tensors themselves would run their hooks, which then run again for what the backward pass returns;
    and one of them may depend on the others.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [one.view_as(one) if again else one.detach() for one in tensors]
    return [one if again else one.requires_grad_(need) for one, need in zip(aliases, needed, strict=True)]


class Layer(NamedTuple):
    """A frozen linear layer, and the factor of the update of its weight.

    `y` is its output, which may be changed and is detached; `flipped` says that its weight is [d_in, d_out].
    """

    y: Float[Tensor, "*batch d_out"]
    weight: Float[Tensor, "_ _"]
    flipped: bool
    scale: float


def layer_beside(
    layer: nn.Module | None, alone: bool, x: Tensor, y: Tensor, parameter: Tensor, scale: float
) -> Layer | None:
    """Returns the layer for `add_linear_with`; None if one autograd node cannot serve the layer and the update.

    Args:
        layer: the layer that computed y from x, if y may be changed in place (see `low_rank.fresh`).
        alone: whether y is still exactly its output.
        parameter: one of the parameters that the update is computed from.
    """
    weight = None if not alone or only_plain(x, y, parameter) else frozen_weight(layer, x, y)
    if weight is None or layer is None:
        return None
    return Layer(y.detach(), weight, is_conv1d(layer), scale)


def add_linear_with(
    layer: Layer,
    x: Float[Tensor, "*batch d_in"],
    build: Callable[..., Tensor],
    parameters: tuple[Tensor, ...],
) -> Float[Tensor, "*batch d_out"]:
    """Returns the layer's output plus the scaled `F.linear(x, build(*parameters))`, and changes the output in place.

    One autograd node serves both: its gradient for x is one product with the sum of both matrices, and not two.

    Args:
        build: see `linear_with`.
        parameters: see `linear_with`.
    """
    if not torch.is_grad_enabled():
        return _added(layer, x, build(*parameters).to(x.dtype))
    out: Tensor = _Recomputed.apply(x, build, layer, *parameters)
    return out


def _added(layer: Layer, x: Tensor, update: Tensor) -> Tensor:
    # No tensor of the output's size is made.
    layer.y.view(-1, layer.y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), update.mT, alpha=layer.scale)
    return layer.y


class _Recomputed(torch.autograd.Function):
    """F.linear with a weight that is built again in the backward pass, alone or added to the output of a frozen layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, build: Callable[..., Tensor], layer: Layer | None, *parameters: Tensor) -> Tensor:
        ctx.build, ctx.scale, ctx.flipped = build, 1.0, False
        weight, update = None, build(*parameters).to(x.dtype)
        if layer is not None:
            ctx.scale, ctx.flipped = layer.scale, layer.flipped
            # As in the layer itself: only the gradient of x needs it.
            weight = layer.weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, weight, *parameters)
        return F.linear(x, update) if layer is None else _added(layer, x, update)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, frozen, *parameters = ctx.saved_tensors
        needs_x, _, _, *needed = ctx.needs_input_grad
        again = torch.is_grad_enabled()
        update, asked = _built_again(ctx.build, parameters, needed)
        gx = None
        if needs_x:
            # Second derivatives go through the matrix, too.
            whole = (update if again else update.detach()).to(g.dtype)
            if frozen is None:
                gx = g @ whole
            elif g.dtype.itemsize > 2:
                gx = g @ torch.add(frozen.mT if ctx.flipped else frozen, whole, alpha=ctx.scale)
            else:
                # The sum of both matrices, rounded to 16 bits, would lose small updates.
                gx = g @ (frozen.mT if ctx.flipped else frozen) + (g @ whole) * ctx.scale
        found: list[Tensor | None] = [None] * len(parameters)
        if any(needed) and update.requires_grad:
            # Under autocast the product has another dtype than x.
            rows = g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1]).to(g.dtype)
            rows = rows if ctx.scale == 1 else rows * ctx.scale
            found = _summed(update, asked, rows.to(update.dtype), again)
        return gx, None, None, *found


def _built_again(
    build: Callable[..., Tensor], parameters: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor, list[list[Tensor]]]:
    """Returns the matrix, and for each parameter the tensors whose gradients add up to its own; none if it needs none.

    These are an alias, and the parameter itself for what a formula reads around the alias: a closure, a method that
    `__init__` has bound, or a list of parameters.
    """
    if isinstance(build, ComputedBy) and not build.takes_others:
        with torch.enable_grad():
            return build.by_the_module(), [[one] if need else [] for one, need in zip(parameters, needed, strict=True)]
    aliases = _aliases(parameters, needed)
    if torch.is_grad_enabled():
        # An alias with a graph of its own leads to the parameter, too: the gradients of both would overlap.
        with torch.no_grad():
            around = _reads_around(build, parameters, needed)
        chosen = parameters if around else aliases
        return build(*chosen), [[one] if need else [] for one, need in zip(chosen, needed, strict=True)]
    with torch.enable_grad():
        update = build(*aliases)
    pairs = zip(aliases, parameters, needed, strict=True)
    return update, [[alias, one] if need else [] for alias, one, need in pairs]


def _reads_around(build: Callable[..., Tensor], parameters: Sequence[Tensor], needed: Sequence[bool]) -> bool:
    """Whether a formula reads parameters themselves although it was given aliases."""
    aliases, own = _aliases(parameters, needed), [one for one, need in zip(parameters, needed, strict=True) if need]
    with torch.enable_grad():
        update = build(*aliases)
    if not (own and update.requires_grad):
        return False
    found = torch.autograd.grad(update, own, torch.zeros_like(update), allow_unused=True)
    return any(gradient is not None for gradient in found)


def _summed(update: Tensor, asked: Sequence[Sequence[Tensor]], g: Tensor, again: bool) -> list[Tensor | None]:
    """Returns for each list the sum of the gradients of its tensors; None if the update depends on none of them."""
    flat = [one for own in asked for one in own]
    gradients = iter(torch.autograd.grad(update, flat, g, create_graph=again, allow_unused=True))
    found: list[Tensor | None] = []
    for own in asked:
        parts = [part for part in (next(gradients) for _ in own) if part is not None]
        found.append(None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1])
    return found
