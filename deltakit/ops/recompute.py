"""Products with a full weight update, which is recomputed in the backward pass.

Some methods compute a full matrix [d_out, d_in] for each layer (LoHa, FourierFT). Saved for the backward pass, these would
take as much memory as the backbone's weights.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad


def linear_with(
    x: Float[Tensor, "*batch d_in"], build: Callable[[], Tensor], parameters: tuple[Tensor, ...]
) -> Float[Tensor, "*batch d_out"]:
    """Returns `F.linear(x, build())`. Only x is saved for the backward pass, not the matrix.

    Args:
        build: returns the matrix [d_out, d_in], and must return the same one each time.
        parameters: the tensors that `build` reads and that require gradients.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _transformed():
        return F.linear(x, build().to(x.dtype))
    return _Recomputed.apply(x, build, *parameters)


def _transformed() -> bool:
    """Whether a transform of torch.func runs, or forward-mode differentiation: they take no gradients by hand."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Recomputed(torch.autograd.Function):
    """F.linear with a weight that is built again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, build: Callable[[], Tensor], *parameters: Tensor) -> Tensor:
        ctx.build, ctx.count = build, len(parameters)
        ctx.save_for_backward(x, *parameters)
        return F.linear(x, build().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        needs_x, _, *needed = ctx.needs_input_grad
        asked = [parameter for parameter, need in zip(parameters, needed, strict=True) if need]
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            weight = ctx.build()
        # Second derivatives go through the matrix, too.
        gx = g @ (weight if again else weight.detach()).to(g.dtype) if needs_x else None
        found: list[Tensor | None] = []
        if asked and weight.requires_grad:
            # Under autocast the product has another dtype than x.
            rows = g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1]).to(g.dtype)
            found = list(
                torch.autograd.grad(weight, asked, rows.to(weight.dtype), create_graph=again, allow_unused=True)
            )
        gradients = iter(found or [None] * len(asked))
        return gx, None, *(next(gradients) if need else None for need in needed)
