"""HiRA: dW = W * (B A), the weight times a low-rank matrix element by element, which has the rank of both together.

Huang et al. 2025 (ICLR), "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models". A and B start
as LoRA's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Method, Target, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import (
    WeightMap,
    WeightMethod,
    check_rank,
    kaiming_uniform,
    like,
    sizes,
    stack_of,
    sum_of_products,
)


class HiRADelta(WeightMap):
    """The factors `A` [*stack, r, d_in] and `B` [*stack, d_out, r]. B starts at zero; of embeddings A does, as in PEFT."""

    def __init__(self, target: Target, options: "HiRA") -> None:
        super().__init__(target)
        d_in, d_out = sizes(target, "HiRA")
        self.embeds = isinstance(target.module, nn.Embedding)
        self.A = nn.Parameter(torch.empty(*stack_of(target), options.r, d_in, **like(target)))
        self.B = nn.Parameter(torch.empty(*stack_of(target), d_out, options.r, **like(target)))
        if wants_start_values(self.A):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.embeds:
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B)
        else:
            kaiming_uniform(self.A)
            nn.init.zeros_(self.B)

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return weight * (self.B.to(weight.dtype) @ self.A.to(weight.dtype))

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        terms = [(weight, part.A, part.B) for weight, part in parts if isinstance(part, HiRADelta)]
        a, b, lost, norm = sum_of_products(terms, self.A)
        self.A.copy_(a)
        self.B.copy_(b)
        return lost, norm

    def summary(self) -> str:
        return f"r={self.A.shape[-2]}"


@dataclass(frozen=True, kw_only=True)
class HiRA(WeightMethod, name="hira"):
    """Updates that are the weight times a low-rank matrix, element by element.

    The weight is read in each forward, and the full update is computed again in the backward pass instead of being kept. A
    weighted sum of several is exact; with a rank it is the best approximation of the low-rank matrix.

    Args:
        r: the rank, at least 1 and at most the smaller side of the weight.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range.
    """

    kind: ClassVar[type[DeltaModule]] = HiRADelta
    design: ClassVar[Design] = Design(form="(W * (B A)) x")
    on_stacks: ClassVar[bool] = True

    r: int = 32

    def validate(self) -> None:
        if self.r < 1:
            raise OptionError(f"HiRA(r={self.r}): expected a rank of at least 1; 32 is usual")

    def build_at(self, target: Target) -> DeltaModule:
        check_rank(target, "HiRA", self.r)
        return super().build_at(target)

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> Method:
        own = [part for part in parts if isinstance(part, HiRADelta)]
        full = min(min(part.A.shape[-1], part.B.shape[-2]) for part in own)
        return cls(r=rank if rank is not None else min(full, sum(part.A.shape[-2] for part in own)))
