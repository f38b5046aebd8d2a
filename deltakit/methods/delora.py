"""DeLoRA: dW = B diag(lam / (r |A_i| |B_i|)) A diag(|W_j|): the direction and the strength `lam` are learned apart.

Bini et al. 2025, https://arxiv.org/abs/2503.18225. A_i are the rows of A, B_i the columns of B, and W_j the columns
of the weight, whose norms are taken when the delta is attached and saved with it, as in PEFT. Norms below 1e-4 count as 1e-4.

A product of normalized factors has no zero near which it is smooth. The authors start with random factors and subtract their
product from the weight; here it is subtracted from the update. PEFT starts with B = 0 instead (`start="zero"`): then the first
gradient of B is divided by 1e-4, which only optimisers like Adam take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import FROZEN, DeltaModule, Design, Target, bare_weight, wants_start_values, wide
from deltakit.errors import OptionError
from deltakit.ops import LowRank, LowRankMethod, check_rank, difference, kaiming_uniform, like

_SMALLEST = 1e-4


class DeLoRADelta(LowRank):
    """The factors `A` [r, d_in] and `B` [d_out, r], and the strength `lam` [1].

    Never trained are `norms` [d_in], and the start `A0`, `B0` of random factors.
    """

    tags: ClassVar[Mapping[str, str]] = {
        "A": "down",
        "B": "up",
        "lam": "strength",
        **dict.fromkeys(("norms", "A0", "B0"), FROZEN),
    }

    def __init__(self, target: Target, options: "DeLoRA") -> None:
        super().__init__(target, dropout=options.dropout)
        self.start = options.strength
        self.A = nn.Parameter(torch.empty(options.r, self.d_in, **like(target)))
        self.B = nn.Parameter(torch.empty(self.d_out, options.r, **like(target)))
        self.lam = nn.Parameter(torch.empty(1, **like(target)))
        self.norms = nn.Parameter(torch.empty(self.d_in, **like(target)))
        self.differs = options.start == "random"
        if self.differs:
            self.A0, self.B0 = (nn.Parameter(torch.empty_like(factor)) for factor in (self.A, self.B))
        if wants_start_values(self.A):
            self.reset_parameters()
            weight = wide(bare_weight(target.module, self.view))
            self.norms.data.copy_(torch.linalg.vector_norm(weight, dim=0))

    def reset_parameters(self) -> None:
        kaiming_uniform(self.A)
        nn.init.constant_(self.lam, self.start)
        if not self.differs:
            nn.init.zeros_(self.B)
            return
        kaiming_uniform(self.B)
        self.A0.data.copy_(self.A.data)
        self.B0.data.copy_(self.B.data)

    def factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        a, b = self._normalized(self.A, self.B, self.lam)
        if not self.differs:
            return a, b
        return difference(a, b, *self._normalized(self.A0, self.B0, torch.full_like(self.lam, self.start)))

    def _normalized(self, a: Tensor, b: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        # The norms of long rows overflow in float16.
        norms = wide(a).norm(dim=1).clamp_min(_SMALLEST) * wide(b).norm(dim=0).clamp_min(_SMALLEST)
        return a * self.norms, b * (wide(lam) / len(a) / norms).to(b.dtype)

    def summary(self) -> str:
        return f"r={len(self.A)} strength={self.start:g}"


@dataclass(frozen=True, kw_only=True)
class DeLoRA(LowRankMethod, name="delora"):
    """Low-rank updates of a trained strength and direction.

    Args:
        r: the rank, at least 1 and at most the smaller side of the weight.
        strength: the start value of lam, above 0. A smaller one keeps the update nearer to the backbone.
        start: "random" as in the paper (the outputs stay those of the backbone), or "zero" as in PEFT.
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range.
    """

    kind: ClassVar[type[DeltaModule]] = DeLoRADelta
    design: ClassVar[Design] = Design(form="B diag(lam / (r |A_i| |B_i|)) A diag(|W_j|) x")

    r: int = 8
    strength: float = 15
    start: Literal["random", "zero"] = "random"

    def validate(self) -> None:
        super().validate()
        if self.r < 1:
            raise OptionError(f"DeLoRA(r={self.r}): expected a rank of at least 1; 8 is usual")
        if not 0 < self.strength <= torch.finfo(torch.float32).max:
            raise OptionError(f"DeLoRA(strength={self.strength}): expected a finite number above 0; 15 is usual")

    def build_at(self, target: Target) -> DeltaModule:
        check_rank(target, "DeLoRA", self.r)
        return super().build_at(target)
