"""MiSS: y = W x + B h, where h sums the features of x with the same place in blocks of r: h_j = x_j + x_{j+r} + x_{j+2r} + ...

Kang and Yin 2024, https://arxiv.org/abs/2409.15371 (first called Bone). It is LoRA with a fixed A, rows of an identity matrix
side by side; only B is trained, and starts at zero. With `bat` the update depends on the weight: with W in blocks of r x r,
each block in the rows of block o gets W_block B_o + B_o.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Design, Method, Target
from deltakit.errors import OptionError, TargetError
from deltakit.ops import LowRank, LowRankMethod, Seeded, WeightMap, largest_sizes, like, sizes, take_weighted_sum


class MiSSDelta(LowRank):
    """The factor `B` [d_out, r]; with `mini`, its first rows [mini, r], which are repeated."""

    def __init__(self, target: Target, options: "MiSS") -> None:
        super().__init__(target, dropout=options.dropout)
        rows = self.d_out if options.mini is None else options.mini
        if options.r > self.d_in or self.d_out % rows:
            raise OptionError(
                f"{target.named}: MiSS(r={options.r}, mini={options.mini}) does not fit a layer of {self.d_in} to "
                f"{self.d_out} features; use an r of at most {self.d_in} and a mini that divides {self.d_out}, or leave it "
                "out with exclude="
            )
        self.B = nn.Parameter(torch.zeros(rows, options.r, **like(target)))

    def factors(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        tiles = self.shared.tiles.to(self.B)
        # Repeated once, B would be a copy that is kept for the backward pass.
        times = self.d_out // len(self.B)
        return tiles[:, : self.d_in], self.B if times == 1 else self.B.repeat(times, 1)

    def add_product(
        self, y: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"], scale: float
    ) -> Float[Tensor, "*batch d_out"]:
        # Sums of features, and no product with A.
        b, r = self.B.to(x.dtype), self.B.shape[1]
        h = F.pad(x, (0, -self.d_in % r)).unflatten(-1, (-1, r)).sum(-2) * scale
        if len(b) == self.d_out:
            return torch.addmm(y.reshape(-1, self.d_out), h.reshape(-1, r), b.mT).view(y.shape)
        return (y.unflatten(-1, (-1, len(b))) + F.linear(h, b)[..., None, :]).flatten(-2)

    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return take_weighted_sum(self, "B", parts)

    def summary(self) -> str:
        return f"r={self.B.shape[1]}" + (f" mini={len(self.B)}" if len(self.B) < self.d_out else "")


class MiSSBatDelta(WeightMap):
    """The blocks `B` [d_out / r, r, r]."""

    def __init__(self, target: Target, options: "MiSS") -> None:
        super().__init__(target)
        d_in, d_out = sizes(target, "MiSS")
        if d_in % options.r or d_out % options.r:
            raise OptionError(
                f"{target.named}: MiSS(r={options.r}, bat=True) expects sizes that r divides, and the layer has {d_in} to "
                f"{d_out} features; use another r, or leave it out with exclude="
            )
        self.B = nn.Parameter(torch.zeros(d_out // options.r, options.r, options.r, **like(target)))

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        blocks, r = self.B.to(weight.dtype), self.B.shape[-1]
        # [d_out / r, d_in / r, r, r]
        parts = weight.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)
        return (parts @ blocks[:, None] + blocks[:, None]).transpose(1, 2).flatten(2).flatten(0, 1)

    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return take_weighted_sum(self, "B", parts)

    def summary(self) -> str:
        return f"r={self.B.shape[-1]} bat"


@dataclass(frozen=True, kw_only=True)
class MiSS(LowRankMethod, name="miss"):
    """Updates in which the rows of a weight repeat themselves: one trained matrix [d_out, r] for each layer.

    A weighted sum of several with the same r and mini is exact, and a MiSS; of others it is a LoRA.

    Args:
        r: the length of the part that repeats, at least 1 and at most the number of input features.
        mini: instead of all, the number of rows that are trained, which are repeated for all output features.
        bat: whether the update depends on the weight, in blocks of r x r. It excludes `mini` and `dropout`.
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range, or does not fit the sizes of a target.
    """

    design: ClassVar[Design] = Design(form="B h, h_j = x_j + x_(j+r) + ...")

    r: int = 64
    mini: int | None = None
    bat: bool = False

    def validate(self) -> None:
        super().validate()
        for option in ("r", "mini"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"MiSS({option}={value}): expected at least 1; r=64 is usual")
        if self.bat and (self.mini is not None or self.dropout):
            raise OptionError("MiSS(bat=True) has neither mini nor dropout; omit them")

    def kind_at(self, target: Target) -> type[DeltaModule]:
        return MiSSBatDelta if self.bat else MiSSDelta

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module | None:
        if self.bat:
            return None
        return Seeded(0, {"tiles": ((self.r, largest_sizes(targets, "MiSS")[0]), _tiled)}, **like(targets[0]))

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> Method:
        own = [part for part in parts if isinstance(part, MiSSDelta | MiSSBatDelta)]
        first, alike = own[0], len({part.B.shape for part in own}) == 1
        if isinstance(first, MiSSDelta) and alike and rank is None:
            return cls(r=first.B.shape[1], mini=None if len(first.B) == first.d_out else len(first.B))
        if alike and isinstance(first, MiSSBatDelta):
            return cls(r=first.B.shape[-1], bat=True)
        if any(isinstance(part, MiSSBatDelta) for part in own):
            raise TargetError(
                "MiSS(bat=True) has no weighted sums with others than of the same r and bat=True; run the deltas one by one"
            )
        return super().combination(parts, rank)


def _tiled(values: Float[Tensor, "r d_in"], _: torch.Generator) -> None:
    r, d_in = values.shape
    values.copy_(torch.eye(r, device=values.device).repeat(1, -(-d_in // r))[:, :d_in])
