"""RoAd: rotates and scales pairs of a layer's outputs.  Liao and Monz 2024, https://arxiv.org/abs/2409.00119, section 3.

In groups of g features, y_i and y_(i + g/2) are a pair: y_i' = a_i cos(t_i) y_i - a_i sin(t_i) y_(i + g/2), and
y_(i + g/2)' = a_j sin(t_j) y_i + a_j cos(t_j) y_(i + g/2) with j = i + g/2. Untrained angles t are 0 and scales a are 1. The
groups decide only which features are pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import BareLayer, DeltaModule, Design, Method, Target, wide
from deltakit.errors import OptionError, TargetError
from deltakit.ops import QUERIES_AND_VALUES, OutputMap, block_size_for, like

_SIZES = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}
"""For each variant the number of values of an angle, and the number of features that share them."""


class RoAdDelta(OutputMap):
    """Rotates and scales pairs of outputs. `angle` [k] starts at zero, and `scale` [k] at one.

    k is d / 2 (road_1: one for each pair), d (road_2: one for each feature) or 2 d (road_4: in each group one for each cosine,
    and then one for each sine).
    """

    def __init__(self, target: Target, options: "RoAd") -> None:
        super().__init__(target)
        self.variant = options.variant
        self.group_size = block_size_for(target, "RoAd(group_size", options.group_size, 64, self.size, least=2, step=2)
        count, shared = _SIZES[self.variant]
        self.angle = nn.Parameter(torch.zeros(self.size * count // shared, **like(target)))
        self.scale = nn.Parameter(torch.ones(self.size * count // shared, **like(target)))

    def columns(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Returns the factors of the features themselves, and those of the other features of their pairs, without signs."""
        count, shared = _SIZES[self.variant]
        angle, scale = (
            value.view(-1, count, 1, self.group_size // shared).expand(-1, -1, shared, -1)
            for value in (self.angle, self.scale)
        )
        # Of road_4 the first value is that of the cosine, and the last that of the sine.
        return (scale[:, 0] * angle[:, 0].cos()).flatten(), (scale[:, -1] * angle[:, -1].sin()).flatten()

    def turned(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Returns -y_(i + g/2) for the first half of each group, and y_(i - g/2) for the second."""
        first, second = y.unflatten(-1, (-1, 2, self.group_size // 2)).unbind(-2)
        return torch.stack((-second, first), -2).flatten(-3)

    def forward(self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        own, other = self.columns()
        return y * own + self.turned(y) * other

    def linear_update(self, layer: BareLayer) -> tuple[Tensor, Tensor | None]:
        own, other = (wide(column) for column in self.columns())
        weight, bias = layer.weight.mT, layer.bias
        change = ((own - 1) * weight + other * self.turned(weight)).mT
        return change, None if bias is None else (own - 1) * bias + other * self.turned(bias)

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        terms = [(weight, part.columns()) for weight, part in parts if isinstance(part, RoAdDelta)]
        cosine = 1 + torch.stack([weight * (wide(own) - 1) for weight, (own, _) in terms]).sum(0)
        sine = torch.stack([weight * wide(other) for weight, (_, other) in terms]).sum(0)
        count, shared = _SIZES[self.variant]
        # The same columns as angles and scales: of road_4 each column has its own.
        pair = torch.stack((cosine, sine)).view(2, -1, shared, self.group_size // shared)[:, :, 0]
        zero = torch.zeros_like(pair[0])
        given = [(zero, pair[0]), (pair[1], zero)] if count == 2 else [(pair[1], pair[0])]
        self.angle.copy_(torch.stack([torch.atan2(*one) for one in given], 1).flatten())
        self.scale.copy_(torch.stack([torch.hypot(*one) for one in given], 1).flatten())
        return 0.0, float((cosine - 1).square().sum() + sine.square().sum())

    def summary(self) -> str:
        return f"{self.variant} group_size={self.group_size}"


@dataclass(frozen=True, kw_only=True)
class RoAd(Method, name="road"):
    """Rotary adapters: trained rotations and scales of pairs of outputs.

    Args:
        variant: "road_1" has an angle and a scale for each pair, "road_2" for each feature, and "road_4" two for each feature.
        group_size: the size of the groups in which pairs are formed; even, and it divides the number of features. By default
            the largest such size up to 64, or the smallest one if all are larger.

    Raises:
        OptionError: if an option is out of its range.
    """

    kind: ClassVar[type[DeltaModule]] = RoAdDelta
    design: ClassVar[Design] = Design(form="a R(t) y, pairs of features", composition="product")

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int | None = None

    def validate(self) -> None:
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            raise OptionError(f"RoAd(group_size={self.group_size}): expected an even number of features; 64 is usual")

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return QUERIES_AND_VALUES

    def build_at(self, target: Target) -> DeltaModule:
        return RoAdDelta(target, self)

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> "RoAd":
        own = {(part.variant, part.group_size) for part in parts if isinstance(part, RoAdDelta)}
        if len(own) > 1:
            raise TargetError(
                f"RoAd has sums of one variant and group size only, found {sorted(own)}; run the deltas one by one"
            )
        ((variant, group_size),) = own
        return cls(variant=variant, group_size=group_size)
