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
from deltakit.errors import StateError
from deltakit.ops.fast_paths import frozen_weight, is_dense, only_plain
from deltakit.ops.module_copy import OTHERS, ComputedBy


def linear_with(
    x: Float[Tensor, "*batch d_in"], build: Callable[..., Tensor], parameters: tuple[Tensor, ...] = ()
) -> Float[Tensor, "*batch d_out"]:
    """Returns `F.linear(x, build(*parameters))`. Only x is saved for the backward pass, not the matrix.

    Args:
        build: returns the matrix [d_out, d_in] that it computes from the parameters, and is called again in the backward pass.
            So it draws no random numbers. For a formula of a delta module, pass `ComputedBy(self, lambda own: ...)`.
        parameters: what `build` reads and may require gradients. A `ComputedBy` knows them itself.
    """
    if _only_plain() or not is_dense(x):
        return F.linear(x, _built(build, parameters).to(x.dtype))
    return _Recomputed.apply(x, build, None, *_read_by(build, parameters))


def _built(build: Callable[..., Tensor], parameters: Sequence[Tensor]) -> Tensor:
    return build.by_the_module() if isinstance(build, ComputedBy) else build(*parameters)


def _read_by(build: Callable[..., Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    return build.tensors() if isinstance(build, ComputedBy) else parameters


def _only_plain() -> bool:
    """Whether only the formula itself works: without gradients, and where no gradients are taken by hand.

    That is while compiling or tracing, in transforms of torch.func, and in forward-mode differentiation.
    """
    return (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def recomputed(formula: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns `formula(*inputs)`. Only the inputs are saved for the backward pass, where the formula is computed again.

    Args:
        formula: draws no random numbers and reads no other tensors that require gradients.
    """
    # Inference tensors cannot be saved for a backward pass.
    if _only_plain() or any(one.is_inference() or not is_dense(one) for one in inputs):
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
        with torch.enable_grad():
            out = ctx.formula(*inputs)
        # Those of which the user has switched `requires_grad` off since the forward get no gradient, as in torch.
        each = [[one] if need and one.requires_grad else [] for one, need in zip(inputs, needed, strict=True)]
        return None, *_summed(out, each, g, again)


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
        layer: the layer that computed y from x, if y may be changed in place (see `fast_paths.fresh`).
        alone: whether y is still exactly its output.
        parameter: one of the parameters that the update is computed from.
    """
    weight = None if not alone or only_plain(x, y, parameter) else frozen_weight(layer, x, y)
    if weight is None or layer is None:
        return None
    return Layer(y.detach(), weight, is_conv1d(layer), scale)


def add_linear_with(layer: Layer, x: Float[Tensor, "*batch d_in"], build: ComputedBy) -> Float[Tensor, "*batch d_out"]:
    """Returns the layer's output plus the scaled product of x with the matrix, and changes the output in place.

    One autograd node serves both: its gradient for x is one product with the sum of both matrices, and not two.

    Args:
        build: see `linear_with`.
    """
    if not torch.is_grad_enabled():
        return _added(layer, x, build.by_the_module().to(x.dtype))
    out: Tensor = _Recomputed.apply(x, build, layer, *build.tensors())
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
        weight, update = None, _built(build, parameters).to(x.dtype)
        if layer is not None:
            ctx.scale, ctx.flipped = layer.scale, layer.flipped
            # As in the layer itself: only the gradient of x needs it.
            weight = layer.weight if ctx.needs_input_grad[0] else None
        # A formula may read the same weight. Hooks that copy what is saved (`save_on_cpu`) would copy it twice.
        ctx.at = next((place for place, one in enumerate(parameters) if one is weight), None)
        ctx.save_for_backward(x, None if ctx.at is not None else weight, *parameters)
        return F.linear(x, update) if layer is None else _added(layer, x, update)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, frozen, *parameters = ctx.saved_tensors
        frozen = frozen if ctx.at is None else parameters[ctx.at]
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

    Each list has the alias that the formula was given, and the parameter itself, because the formula may also reach it by a
    closure, a bound method or a list.
    """
    if isinstance(build, ComputedBy) and not build.takes_others:
        build.refuse_others(parameters)
        with torch.enable_grad():
            update = build.by_the_module()
        each = [[one] for one in parameters]
    else:
        aliases = _aliases(parameters, needed)
        with torch.enable_grad():
            update = build(*aliases)
        if not torch.is_grad_enabled():
            each = [[alias, one] for alias, one in zip(aliases, parameters, strict=True)]
        else:
            # An alias with a graph of its own leads to the parameter, too: the gradients of both would overlap.
            with torch.no_grad():
                around = _reads_around(build, parameters, needed)
            each = [[one] for one in (parameters if around else aliases)]
    # The user may have switched `requires_grad` off since the forward, as `delta.trainable = False` does.
    return update, [
        [one for one in own if one.requires_grad] if need else [] for own, need in zip(each, needed, strict=True)
    ]


def _reads_around(build: Callable[..., Tensor], parameters: Sequence[Tensor], needed: Sequence[bool]) -> bool:
    """Whether a formula reads parameters themselves although it was given aliases."""
    aliases = _aliases(parameters, needed)
    own = [one for one, need in zip(parameters, needed, strict=True) if need and one.requires_grad]
    with torch.enable_grad():
        update = build(*aliases)
    if not (own and update.requires_grad):
        return False
    found = torch.autograd.grad(update, own, torch.zeros_like(update), allow_unused=True)
    return any(gradient is not None for gradient in found)


def _summed(update: Tensor, asked: Sequence[Sequence[Tensor]], g: Tensor, again: bool) -> list[Tensor | None]:
    """Returns for each list the sum of the gradients of its tensors; None if the update depends on none of them."""
    flat = [one for own in asked for one in own]
    if not flat:
        return [None] * len(asked)
    gradients = iter(torch.autograd.grad(update, flat, g, create_graph=again, allow_unused=True))
    found: list[Tensor | None] = []
    for own in asked:
        parts = [part for part in (next(gradients) for _ in own) if part is not None]
        found.append(None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1])
    if all(gradient is None for gradient in found):
        raise StateError(OTHERS)
    return found
