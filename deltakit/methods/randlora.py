"""RandLoRA: dW = s sum_j B_j L_j A G_j, a full-rank sum of random frozen products, scaled by trained diagonals L and G.

Albert et al. 2025, https://arxiv.org/abs/2502.00987. There are ceil(min(d_in, d_out) / r) products of rank r, so a larger r
has fewer parameters. All targets share A and the B_j, and use their first rows and columns. Where d_in is above d_out, the
update is that of the transposed weight. L starts at zero and G at 1 / min(d_in, d_out).

The frozen matrices are drawn and paired as PEFT does it, so that its files fit: uniform in bfloat16, each divided by its
deviation; and the k-th row of A in product j stands beside the column k n + j of all B side by side, n being their number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Design, Target, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import (
    WHOLE_LAYERS,
    ComputedBy,
    LowRank,
    LowRankMethod,
    Seeded,
    add_linear_with,
    check_alpha,
    check_seed,
    drawn_sizes,
    largest_sizes,
    layer_beside,
    like,
    linear_with,
)

# torch has it since 2.7.
_is_exporting = getattr(torch.compiler, "is_exporting", bool)


class RandLoRADelta(LowRank):
    """The scales `L` [r, n] and `G` [n, min(d_in, d_out)] of n products.

    `shared` has the frozen `A` [r, 1, min(d_in, d_out)] and `B` [max(d_in, d_out), n, r] of the largest target.
    """

    def __init__(self, target: Target, options: "RandLoRA") -> None:
        super().__init__(target, scaling=options.alpha / options.r, dropout=options.dropout)
        smaller = min(self.d_in, self.d_out)
        count = -(-smaller // options.r)
        self.L = nn.Parameter(torch.empty(options.r, count, **like(target)))
        self.G = nn.Parameter(torch.empty(count, smaller, **like(target)))
        if wants_start_values(self.L):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.L)
        nn.init.constant_(self.G, 1 / self.G.shape[1])

    def factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        thin, frozen = self._thin(), self._frozen()
        return (thin, frozen) if self.d_in <= self.d_out else (frozen.T, thin.T)

    def _thin(self) -> Float[Tensor, "rank smaller"]:
        """Returns all L_j A G_j, one above the other."""
        a = self.shared._buffers["A"].to(self.L)
        return (self.L[..., None] * a[:, :, : self.G.shape[1]] * self.G).flatten(0, 1)

    def _frozen(self) -> Float[Tensor, "larger rank"]:
        """Returns all B_j, side by side."""
        b = self.shared._buffers["B"].to(self.L)
        return b[: max(self.d_in, self.d_out), : self.L.shape[1]].flatten(1)

    def forward(
        self,
        x: Shaped[Tensor, "*input"],
        y: Float[Tensor, "*output"],
        layer: nn.Module | None = None,
        alone: bool = False,
    ) -> Float[Tensor, "*output"]:
        if self.layer_kind not in WHOLE_LAYERS:
            added: Tensor = super().forward(x, y, layer, alone)
            return added
        # The rank is that of a full matrix, so one factor is as large as the weight, and the product with A as x. Both are
        # computed again in the backward pass, which needs only x, or the product with the frozen factor.
        x = self._dropped(x)
        count, rank = x.numel() // self.d_in, min(self.d_in, self.d_out)
        many = _is_exporting() or self.d_in * self.d_out * (count + rank) <= count * rank * (self.d_in + self.d_out)
        if many:
            # With many tokens the matrix costs less than the two products. An exported program may not ask how many there are.
            scale = self.scaling * self.strength
            full = ComputedBy(self, RandLoRADelta._full)
            joint = None if self.drops else layer_beside(layer, alone, x, y, self.L, scale)
            if joint is not None:
                return add_linear_with(joint, x, full)
            change = linear_with(x, full)
        elif self.d_in <= self.d_out:
            change = F.linear(linear_with(x, ComputedBy(self, RandLoRADelta._thin)), self._frozen().to(x.dtype))
        else:
            thin = ComputedBy(self, lambda own: own._thin().T)
            change = linear_with(F.linear(x, self._frozen().T.to(x.dtype)), thin)
        return y + (self.scaling * self.strength * change).to(y.dtype)

    def _full(self) -> Float[Tensor, "d_out d_in"]:
        a, b = self.factors()
        return b @ a

    def summary(self) -> str:
        r, count = self.L.shape
        return f"r={r} x {count}"


@dataclass(frozen=True, kw_only=True)
class RandLoRA(LowRankMethod, name="randlora"):
    """Updates of full rank from random frozen factors, scaled by trained vectors.

    Args:
        r: the rank of each product, at least 1. A larger one has fewer parameters.
        alpha: the update is multiplied by alpha / r; at least 0.
        bases: how the frozen matrices are drawn: "uniform", or with entries of -1, 0 and 1 ("sparse": a third of them is not
            zero; "very_sparse": one in the root of the size).
        seed: the seed of the frozen matrices, at least 0.
        sizes: the largest input and output size, in any order, that they are drawn for; by default those of the targets. Set
            it to get the same matrices on other targets.
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range, or `sizes` are below those of a target.
    """

    kind: ClassVar[type[DeltaModule]] = RandLoRADelta
    design: ClassVar[Design] = Design(form="sum of B_j L_j A G_j x")

    r: int = 32
    alpha: float = 640
    bases: Literal["uniform", "sparse", "very_sparse"] = "uniform"
    seed: int = 0
    sizes: tuple[int, int] | None = None

    def validate(self) -> None:
        super().validate()
        if self.r < 1:
            raise OptionError(f"RandLoRA(r={self.r}): expected a rank of at least 1; 32 is usual")
        check_alpha("RandLoRA", self.alpha)
        check_seed("RandLoRA", self.seed, self.sizes)

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module:
        # Which of the two sides is the smaller one does not matter: the larger layers may be wide or tall.
        needed, sizes = (_sorted(one) for one in (largest_sizes(targets, "RandLoRA"), self.sizes))
        assert needed is not None
        smaller, larger = drawn_sizes("RandLoRA", needed, sizes)
        every = {"sparse": 3.0, "very_sparse": math.sqrt(smaller)}.get(self.bases)
        draw = _uniform if every is None else partial(_sparse, every)
        recipes = {"A": ((self.r, 1, smaller), draw), "B": ((larger, -(-smaller // self.r), self.r), draw)}
        return Seeded(self.seed, recipes, one_stream=True, **like(targets[0]))


def _sorted(sizes: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if sizes is None else (min(sizes), max(sizes))


def _uniform(values: Float[Tensor, "rows count columns"], generator: torch.Generator) -> None:
    rows, count, columns = values.shape
    # Each product is drawn for itself. The bound is that of nn.Linear.
    bound = 1 / math.sqrt(columns)
    parts = [torch.empty(rows, 1, columns, dtype=torch.bfloat16, device="cpu") for _ in range(count)]
    drawn = torch.cat([part.uniform_(-bound, bound, generator=generator) for part in parts], dim=1)
    values.copy_(drawn / drawn.std())


def _sparse(every: float, values: Float[Tensor, "rows count columns"], generator: torch.Generator) -> None:
    drawn = torch.rand(values.shape, generator=generator, device="cpu")
    signs = (drawn > 1 - 1 / (2 * every)).float() - (drawn < 1 / (2 * every)).float()
    values.copy_(signs / signs.std())
