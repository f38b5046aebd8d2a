"""VeRA: y = W x + b * (B (d * A x)) with random frozen A and B that all targets share, and trained vectors b and d.

Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454, section 3. b starts at zero and d at 0.1, as in PEFT.

A target uses the first d_in columns of A and the first d_out rows of B. They are drawn as PEFT draws them: uniform, with the
variance 2 / fan-in, A and then B from one generator. So their numbers depend on the sizes of the largest target.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Design, Target, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import Draw, LowRank, LowRankMethod, Seeded, check_seed, drawn_sizes, largest_sizes, like, uniform


class VeRADelta(LowRank):
    """The vectors `b` [d_out] and `d` [r]; `shared` has the frozen `A` [r, d_in] and `B` [d_out, r] of the largest target."""

    tags: ClassVar[Mapping[str, str]] = {"b": "up", "d": "down"}

    def __init__(self, target: Target, options: "VeRA") -> None:
        super().__init__(target, dropout=options.dropout)
        self.start = options.start
        self.b = nn.Parameter(torch.empty(self.d_out, **like(target)))
        self.d = nn.Parameter(torch.empty(options.r, **like(target)))
        if wants_start_values(self.b):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.b)
        nn.init.constant_(self.d, self.start)

    def factors(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        a, b = self._frozen()
        return a, self.b[:, None] * b * self.d

    def add_product(
        self, y: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"], scale: float
    ) -> Float[Tensor, "*batch d_out"]:
        # Two products in the backward pass. By `factors` there would be a third, for the gradient of the scaled B.
        a, b = self._frozen()
        h = F.linear(x, a.to(x.dtype)) * (self.d * scale).to(x.dtype)
        return torch.addcmul(y, F.linear(h, b.to(x.dtype)), self.b.to(x.dtype))

    def _frozen(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        # The targets of a model on several devices share the factors of one of them.
        a, b = (self.shared._buffers[name].to(self.b) for name in "AB")
        return a[:, : self.d_in], b[: self.d_out]

    def summary(self) -> str:
        return f"r={len(self.d)}"


@dataclass(frozen=True, kw_only=True)
class VeRA(LowRankMethod, name="vera"):
    """Low-rank updates of random frozen factors, scaled by trained vectors.

    Args:
        r: the rank, at least 1. It costs time and almost no parameters, so it is larger than LoRA's.
        start: the start value of d, not zero.
        seed: the seed of the frozen factors, at least 0.
        sizes: the largest input and output size that the factors are drawn for; by default those of the targets. Set it to
            get the same factors on other targets.
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range, or `sizes` are below those of a target.
    """

    kind: ClassVar[type[DeltaModule]] = VeRADelta
    design: ClassVar[Design] = Design(form="b * (B (d * A x))", composition="addition")

    r: int = 256
    start: float = 0.1
    seed: int = 0
    sizes: tuple[int, int] | None = None

    def validate(self) -> None:
        super().validate()
        if self.r < 1:
            raise OptionError(f"VeRA(r={self.r}): expected a rank of at least 1; 256 is usual")
        if not self.start or not math.isfinite(self.start):
            raise OptionError(f"VeRA(start={self.start}): expected a finite number that is not zero; 0.1 is usual")
        check_seed("VeRA", self.seed, self.sizes)

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module:
        d_in, d_out = drawn_sizes("VeRA", largest_sizes(targets, "VeRA"), self.sizes)
        recipes = {"A": ((self.r, d_in), _kaiming(d_in)), "B": ((d_out, self.r), _kaiming(self.r))}
        return Seeded(self.seed, recipes, one_stream=True, **like(targets[0]))


def _kaiming(fan_in: int) -> Draw:
    return uniform(math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan_in)))
