"""LowRankAdapter: an adapter whose weights are products of thin matrices: y = y + f(y S_d T_d + b_d) S_u T_u + b_u.

It is a baseline in Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647, section 5.2; the defaults are those of the
authors' code (reduction 32, rank 1). Both factors start Glorot-uniform with a gain of sqrt(2) there. Here T_u is zero, so that
an untrained adapter is the identity. The authors' code multiplies the factors element by element, which is their product for
rank 1 alone; here it is the product for every rank. The authors also train the layer norms: attach with `train="@norm"`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Target, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import Bottleneck, BottleneckMethod, like


class LowRankLinear(nn.Module):
    """y = B A x + bias, with A [r, d_in], B [d_out, r] and bias [d_out]."""

    def __init__(self, d_in: int, d_out: int, r: int, **like: Any) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, d_in, **like))
        self.B = nn.Parameter(torch.empty(d_out, r, **like))
        self.bias = nn.Parameter(torch.empty(d_out, **like))

    def reset_parameters(self) -> None:
        for factor in (self.A, self.B):
            nn.init.xavier_uniform_(factor, gain=math.sqrt(2))
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return F.linear(F.linear(x, self.A), self.B, self.bias)


class LowRankAdapterDelta(Bottleneck):
    """A bottleneck of two low-rank layers `down` and `up`."""

    down: LowRankLinear
    up: LowRankLinear

    def __init__(self, target: Target, options: "LowRankAdapter") -> None:
        super().__init__(target, options)
        size = options.bottleneck(self.size)
        if options.r > min(size, self.size):
            raise OptionError(
                f"{target.named}: rank {options.r} is above the size of the layers, {self.size} to {size}; use "
                f"LowRankAdapter(r={min(size, self.size)}) or less, or a larger bottleneck"
            )
        self.down = LowRankLinear(self.size, size, options.r, **like(target))
        self.up = LowRankLinear(size, self.size, options.r, **like(target))
        if options.gate:
            self.add_gate(self.size, target)
        if wants_start_values(self.down.A):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        self.down.reset_parameters()
        self.up.reset_parameters()
        nn.init.zeros_(self.up.B)

    def forward(self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return y + self.change(y)

    def summary(self) -> str:
        r, size = len(self.down.A), len(self.down.bias)
        return f"size={size} r={r} {self.words}"


@dataclass(frozen=True, kw_only=True)
class LowRankAdapter(BottleneckMethod, name="low_rank_adapter"):
    """Bottleneck adapters with low-rank weights, applied to the output of their targets.

    Args:
        size: the size of the bottleneck in elements, at least 1.
        reduction: instead of `size`: the number of features is divided by it, at least 1; 32 by default.
        r: the rank of both weights, at least 1 and at most the size of the bottleneck.
        activation: gelu, gelu_tanh, relu, leaky_relu, silu or tanh.
        gate: whether a trained gate multiplies the result: a number in (0, 1) for each example, the mean of those of all
            positions (Mao et al. 2022, https://arxiv.org/abs/2110.07577). In decoders it sees later tokens.

    Raises:
        OptionError: if an option is out of its range, or both `size` and `reduction` are given.
    """

    kind: ClassVar[type[DeltaModule]] = LowRankAdapterDelta
    design: ClassVar[Design] = Design(form="f(y S_d T_d + b_d) S_u T_u + b_u")
    usual_reduction: ClassVar[int | None] = 32

    r: int = 1
    activation: str = "gelu_tanh"

    def validate(self) -> None:
        super().validate()
        if self.r < 1:
            raise OptionError(f"LowRankAdapter(r={self.r}): expected a rank of at least 1; 1 is usual")

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return (("attn.o", "attn"), ("ff.down", "ff"))

    def build_at(self, target: Target) -> DeltaModule:
        return LowRankAdapterDelta(target, self)
