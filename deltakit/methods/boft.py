"""BOFT: orthogonal finetuning with butterfly factors, W' = diag(s) W B_1 ... B_m, in which each B_i is a sparse rotation.

Liu et al. 2024, https://arxiv.org/abs/2311.06243, section 4. B_i turns pairs of half blocks that lie 2^(i-1) half blocks
apart, so that few factors mix all features. The scales s of the outputs are those of the authors' code. The bias is not
scaled.

It is a weight map and not an input map: the layer's own product lies between the rotations and the scales, so only an update
of the weight can be multiplied by `Delta.scale`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Target, wide
from deltakit.errors import OptionError
from deltakit.ops import WeightMap, WeightMethod, block_size_for, like, matrix_shape

_MOST_FACTORS = 32
"""More would need more features than there are."""


class BOFTDelta(WeightMap):
    """Rotates the rows of a weight and scales them.

    The skew-symmetric part of `R` [m, *stack, blocks, b, b] gives the rotations; it starts at zero. `scale` [*stack, d_out]
    starts at one.
    """

    tags: ClassVar[Mapping[str, str]] = {"R": "rotation", "scale": "scale"}

    def __init__(self, target: Target, options: "BOFT") -> None:
        super().__init__(target)
        stack, d_out, d_in = matrix_shape(target, self.word())
        # Half blocks are moved, unless there is only one factor.
        step, reach = 2 if options.factors > 1 else 1, 2 ** (options.factors - 1)
        self.block_size = b = block_size_for(
            target, "BOFT(block_size", options.block_size, 4, d_in, least=2, step=step, times=reach
        )
        self.R = nn.Parameter(torch.zeros(options.factors, *stack, d_in // b, b, b, **like(target)))
        self.scale = nn.Parameter(torch.ones(*stack, d_out, **like(target)))

    def weight_update(self, weight: Float[Tensor, "*stack d_out d_in"]) -> Float[Tensor, "*stack d_out d_in"]:
        update = torch.zeros_like(weight)
        for number, factor in enumerate(self.R):
            # (W + D) B - W = D + (W + D) (B - I), which is exactly zero at the start.
            update = update + self._turned(weight + update, wide(factor), number)
        return update + (self.scale.to(weight) - 1)[..., None] * (weight + update)

    def _turned(self, weight: Tensor, factor: Float[Tensor, "*stack blocks b b"], number: int) -> Tensor:
        """Returns the product of the weight and B - I, for the factor with this number."""
        q, b = (factor - factor.mT) / 2, self.block_size
        # Cayley's rotation (I + Q)(I - Q)^-1, minus I.
        turn = torch.linalg.solve(torch.eye(b, dtype=q.dtype, device=q.device) - q, 2 * q, left=False)
        parts = 2 if number else 1
        apart = weight.unflatten(-1, (-1, parts, 2**number, b // parts)).transpose(-2, -3)
        blocks = apart.flatten(-2).flatten(-3, -2)
        new = torch.einsum("...onb,...nbc->...onc", blocks, turn.to(weight))
        return new.reshape(apart.shape).transpose(-2, -3).reshape(weight.shape)

    def summary(self) -> str:
        return f"block_size={self.block_size}" + (f" factors={len(self.R)}" if len(self.R) > 1 else "")


@dataclass(frozen=True, kw_only=True)
class BOFT(WeightMethod, name="boft"):
    """Orthogonal finetuning with butterfly factors: trained rotations and scales of the rows of a weight.

    Args:
        block_size: the size of the rotated blocks in features, at least 2; even with several factors. It times
            2^(factors - 1) divides the number of features. By default the largest such size up to 4, or the smallest one if
            all are larger.
        factors: the number of butterfly factors, at least 1.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range.
    """

    on_stacks: ClassVar[bool] = True
    kind: ClassVar[type[DeltaModule]] = BOFTDelta
    design: ClassVar[Design] = Design(form="diag(s) W B_1 ... B_m x", composition="replacement")

    block_size: int | None = None
    factors: int = 1

    def validate(self) -> None:
        if self.block_size is not None and self.block_size < 2:
            raise OptionError(f"BOFT(block_size={self.block_size}): expected at least 2 features; 4 is usual")
        if not 1 <= self.factors <= _MOST_FACTORS:
            raise OptionError(f"BOFT(factors={self.factors}): expected 1 to {_MOST_FACTORS}")
