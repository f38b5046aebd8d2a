"""LoKr: dW = s (left (x) right), a Kronecker product of a small and a large matrix; the large one may be a product B A.

LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859; KronA, Edalati et al. 2022,
https://arxiv.org/abs/2212.10650. As in LyCORIS the sizes d_in and d_out are each split into two factors, the left one at most
as large as the right one and as near to the root as possible, or to `factor`. The right matrix starts at zero.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Target, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import WeightMap, WeightMethod, check_alpha, kaiming_uniform, kernel_of, like, matrix_sizes


class LoKrDelta(WeightMap):
    """`left` [p, m] and `right` [q, n], with d_out = p q and d_in = m n; of convolutions n is times the size of the kernel.

    Instead of `left` there may be `left_B` [p, r] and `left_A` [r, m]; instead of `right`, `right_B` [q, r] and `right_A`
    [r, n], or in Tucker form `right_B` [r, q], `core` [r, r, positions in the kernel] and `right_A` [r, n].
    """

    reads_weight: ClassVar[bool] = False

    def __init__(self, target: Target, options: "LoKr") -> None:
        super().__init__(target)
        self.scaling, r, positions = options.alpha / options.r, options.r, kernel_of(target).numel()
        d_in, d_out = matrix_sizes(target, "LoKr")
        (m, n), (p, q) = options.split(target, d_in, 1), options.split(target, d_out, 0)
        thin_right = r < max(q, n) / 2 and not options.full
        thin_left = options.both and r < max(p, m) / 2
        shapes: dict[str, tuple[int, ...]] = {"left_B": (p, r), "left_A": (r, m)} if thin_left else {"left": (p, m)}
        if thin_right and options.tucker and positions > 1:
            shapes |= {"right_B": (r, q), "right_A": (r, n), "core": (r, r, positions)}
        else:
            n *= positions
            shapes |= {"right_B": (q, r), "right_A": (r, n)} if thin_right else {"right": (q, n)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, **like(target))))
        if wants_start_values(*self.parameters()):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            (nn.init.zeros_ if name in ("right", "right_A") else kaiming_uniform)(parameter)

    def forward(
        self, weight: Float[Tensor, "..."], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "..."]:
        if x is None:
            return self.weight_update(weight)
        # With the features of x as a matrix [m, n], the product with a Kronecker product is two small products.
        left, right = (self._side(side, x.dtype) for side in ("left", "right"))
        z = torch.einsum("...mn,qn->...mq", x.unflatten(-1, (left.shape[1], -1)), right)
        return self.scaling * torch.einsum("...mq,pm->...pq", z, left).flatten(-2)

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.scaling * torch.kron(self._side("left", weight.dtype), self._side("right", weight.dtype))

    def product(self, target: nn.Module, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self(self._bare(target), x)

    def _side(self, side: str, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        own = {name: parameter.to(dtype) for name, parameter in self._parameters.items() if parameter is not None}
        if side in own:
            return own[side]
        a, b, core = own[f"{side}_A"], own[f"{side}_B"], own.get("core") if side == "right" else None
        return b @ a if core is None else torch.einsum("io,ijk,jc->ock", b, core, a).flatten(1)

    def summary(self) -> str:
        left, right = (self._side(side, torch.float32).shape for side in ("left", "right"))
        return f"{left[0]}x{left[1]} (x) {right[0]}x{right[1]}"


@dataclass(frozen=True, kw_only=True)
class LoKr(WeightMethod, name="lokr"):
    """Updates that are Kronecker products. On linear layers the product itself is never built.

    Args:
        r: the rank of the right matrix, at least 1. From half of its larger side on it is a matrix of full rank.
        alpha: the update is multiplied by alpha / r; at least 0.
        factor: the size that the left matrix should have, if it divides the layer's; -1 for a size near the root.
        left: instead of `factor`: the rows and columns of the left matrix, which must divide the layer's.
        both: whether the left matrix is of rank r, too, where r is below half of its larger side.
        full: whether the right matrix has its full rank whatever r is.
        tucker: whether the right matrix of convolutions has the Tucker form, with a core for each position in the kernel.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range, or `left` does not divide the sizes of a target.
    """

    kind: ClassVar[type[DeltaModule]] = LoKrDelta
    design: ClassVar[Design] = Design(form="(L (x) R) x", composition="scaled addition")

    r: int = 8
    alpha: float = 8
    factor: int = -1
    left: tuple[int, int] | None = None
    both: bool = False
    full: bool = False
    tucker: bool = False

    def validate(self) -> None:
        if self.r < 1:
            raise OptionError(f"LoKr(r={self.r}): expected a rank of at least 1; 8 is usual")
        check_alpha("LoKr", self.alpha)
        if self.factor < 1 and self.factor != -1:
            raise OptionError(f"LoKr(factor={self.factor}): expected at least 1, or -1 for a size near the root")
        if self.left is not None and min(self.left) < 1:
            raise OptionError(f"LoKr(left={self.left}): expected two sizes of at least 1")

    def split(self, target: Target, size: int, side: int) -> tuple[int, int]:
        """Returns the factors of a size: that of the left matrix, and that of the right one.

        Args:
            side: 0 for the rows, 1 for the columns.

        Raises:
            OptionError: if `left` does not divide the size.
        """
        if self.left is None:
            return factorized(size, self.factor)
        if size % self.left[side]:
            raise OptionError(
                f"{target.named}: LoKr(left={self.left}) does not divide its {size} {('output', 'input')[side]} features; use "
                "other sizes, or leave it out with exclude="
            )
        return self.left[side], size // self.left[side]


def factorized(size: int, factor: int) -> tuple[int, int]:
    """Returns the two factors of a size that LyCORIS takes: the first is `factor` or the nearest below it that divides.

    >>> factorized(128, -1), factorized(128, 4), factorized(127, -1), factorized(250, 8)
    ((8, 16), (4, 32), (1, 127), (5, 50))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = size if factor == -1 else factor
    first = max(one for one in range(1, min(largest, math.isqrt(size)) + 1) if size % one == 0)
    return first, size // first
