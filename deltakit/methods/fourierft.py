"""FourierFT: a weight update that is sparse in the frequency domain.  Gao et al. 2024, https://arxiv.org/abs/2405.03003,
section 3.

dW is `scaling` times the real part of the inverse Fourier transform of a matrix with n trained entries. Where they are follows
from a seed. The paper starts them normally distributed, which changes the outputs. Here they start at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Target, wide
from deltakit.errors import OptionError, TargetError
from deltakit.ops import SeededPlaces, WeightMap, WeightMethod, check_seed, like, matrix_shape

_USUAL = 1000


class FourierFTDelta(WeightMap):
    """The trained entries `spectrum` [*stack, n]. They start at zero."""

    reads_weight: ClassVar[bool] = False

    def __init__(self, target: Target, options: "FourierFT") -> None:
        super().__init__(target)
        stack, *self.shape = matrix_shape(target, self.word())
        entries = self.shape[0] * self.shape[1]
        n = min(_USUAL, entries) if options.n is None else options.n
        if n > entries:
            raise OptionError(
                f"{target.named}: FourierFT(n={n}) is more than the {entries} entries of its weight; use n={entries} or less, "
                "or leave it out with exclude="
            )
        self.factor, self.seed = options.scaling, options.seed
        self.spectrum = nn.Parameter(torch.zeros(*stack, n, **like(target)))
        self.places = SeededPlaces(entries, n, options.seed, self.spectrum.device)

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "*stack d_out d_in"]:
        # torch has no transforms of 16 bits.
        entries = wide(self.spectrum)
        matrix = entries.new_zeros(*entries.shape[:-1], self.shape[0] * self.shape[1])
        matrix = matrix.index_copy(-1, self.places.index, entries).unflatten(-1, self.shape)
        # Of a real matrix the transforms back and forth have the same real part, up to the number of entries, and it is the
        # same at (i, j) and (-i, -j). So half of the columns are enough.
        half = torch.fft.rfft2(matrix, norm="forward").real
        other = half[..., 1 : (self.shape[1] + 1) // 2].flip(-2, -1).roll(1, -2)
        return self.factor * torch.cat((half, other), -1)

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        total = torch.zeros_like(wide(self.spectrum))
        for weight, part in parts:
            if isinstance(part, FourierFTDelta):
                # With one seed the places of a smaller number are the first ones of a larger number.
                spectrum = wide(part.spectrum).to(total)
                total[..., : spectrum.shape[-1]] += weight * part.factor / self.factor * spectrum
        self.spectrum.copy_(total)
        return 0.0, float(total.square().sum())

    def summary(self) -> str:
        return f"n={self.spectrum.shape[-1]} scaling={self.factor:g}"


@dataclass(frozen=True, kw_only=True)
class FourierFT(WeightMethod, name="fourierft"):
    """Trained entries of the Fourier transform of a weight update.

    Args:
        n: the number of trained entries of each target, at least 1. By default 1000, or all of a smaller weight.
        scaling: the factor of the update, above 0. Larger ones train faster.
        seed: the seed of the places of the entries, at least 0. It is a part of the file.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range.
    """

    on_stacks: ClassVar[bool] = True
    kind: ClassVar[type[DeltaModule]] = FourierFTDelta
    design: ClassVar[Design] = Design(form="s F^-1(S) x, S sparse")

    n: int | None = None
    scaling: float = 150.0
    seed: int = 777

    def validate(self) -> None:
        if self.n is not None and self.n < 1:
            raise OptionError(f"FourierFT(n={self.n}): expected at least 1 entry; {_USUAL} is usual")
        if not 0 < self.scaling <= torch.finfo(torch.float32).max:
            raise OptionError(f"FourierFT(scaling={self.scaling}): expected a finite number above 0; 150 is usual")
        check_seed("FourierFT", self.seed, None)

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> "FourierFT":
        own = [part for part in parts if isinstance(part, FourierFTDelta)]
        seeds = sorted({part.seed for part in own})
        if len(seeds) > 1:
            raise TargetError(f"FourierFT has sums of one seed only, found {seeds}; run the deltas one by one")
        return cls(n=max(part.spectrum.shape[-1] for part in own), scaling=own[0].factor, seed=seeds[0])
