"""WaveFT: dW is the inverse wavelet transform of a matrix with a few trained coefficients, at places that a seed chooses.

Bilican et al. 2025, https://arxiv.org/abs/2505.12532. The transform is one level of the Haar wavelet, PEFT's default: each
coefficient changes 2 x 2 neighbouring entries of the weight. The coefficients start at zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Method, Target
from deltakit.errors import OptionError, TargetError
from deltakit.ops import SeededPlaces, WeightMap, WeightMethod, check_seed, like, matrix_shape, take_weighted_sum

_USUAL = 2592


class WaveFTDelta(WeightMap):
    """The trained coefficients `spectrum` [n] of a weight."""

    reads_weight: ClassVar[bool] = False

    def __init__(self, target: Target, options: "WaveFT") -> None:
        super().__init__(target)
        _, d_out, d_in = matrix_shape(target, "WaveFT")
        n = min(_USUAL, d_out * d_in) if options.n is None else options.n
        if n > d_out * d_in:
            raise OptionError(
                f"{target.named}: WaveFT(n={n}) is above the {d_out * d_in} entries of its weight; use n={d_out * d_in} or "
                "less, or leave it out with exclude="
            )
        self.sides, self.options = (d_out, d_in), options
        self.places = SeededPlaces(d_out * d_in, n, options.seed, like(target)["device"])
        self.spectrum = nn.Parameter(torch.zeros(n, **like(target)))

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "d_out d_in"]:
        d_out, d_in = self.sides
        # Of an odd size the transform has one row or column more, which is cut off again.
        rows, columns = math.ceil(d_out / 2), math.ceil(d_in / 2)
        places = self.places.index // d_in, self.places.index % d_in
        spectrum = weight.new_zeros(2 * rows, 2 * columns).index_put(places, self.spectrum.to(weight.dtype))
        means, across = spectrum.split(rows)
        (mean, down), (side, diagonal) = means.split(columns, 1), across.split(columns, 1)
        left = torch.stack([mean + down, mean - down], 1).flatten(0, 1)
        right = torch.stack([side + diagonal, side - diagonal], 1).flatten(0, 1)
        whole = torch.stack([left + right, left - right], 2).flatten(1)
        return self.options.scaling / 2 * whole[:d_out, :d_in]

    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        kinds = {(part.places.recipe, part.options.scaling) for _, part in parts if isinstance(part, WaveFTDelta)}
        if kinds != {(self.places.recipe, self.options.scaling)}:
            raise TargetError("WaveFT has sums of one seed, n and scaling only; run the deltas one by one")
        return take_weighted_sum(self, "spectrum", parts)

    def summary(self) -> str:
        return f"n={len(self.spectrum)} scaling={self.options.scaling:g}"


@dataclass(frozen=True, kw_only=True)
class WaveFT(WeightMethod, name="waveft"):
    """Updates whose wavelet transform has n trained coefficients.

    The full update is computed in each forward, and again in the backward pass instead of being kept.

    Args:
        n: the number of coefficients of each weight, at least 1; by default 2592, or all that a smaller weight has.
        scaling: the factor of the update, above 0.
        seed: chooses the places of the coefficients.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range.
    """

    kind: ClassVar[type[DeltaModule]] = WaveFTDelta
    design: ClassVar[Design] = Design(form="s idwt(S) x", composition="scaled addition")

    n: int | None = None
    scaling: float = 25.0
    seed: int = 777

    def validate(self) -> None:
        if self.n is not None and self.n < 1:
            raise OptionError(f"WaveFT(n={self.n}): expected at least 1 coefficient; {_USUAL} is usual")
        if not 0 < self.scaling <= torch.finfo(torch.float32).max:
            raise OptionError(
                f"WaveFT(scaling={self.scaling}): expected a finite number above 0 that float32 holds; 25 is usual"
            )
        check_seed("WaveFT", self.seed, None)

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> Method:
        one = next(part for part in parts if isinstance(part, WaveFTDelta))
        return cls(n=len(one.spectrum), scaling=one.options.scaling, seed=one.options.seed)
