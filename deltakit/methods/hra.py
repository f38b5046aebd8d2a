"""HRA: Householder reflections of the input, y = W H_1 ... H_r x with H_i = I - 2 u_i u_i^T / |u_i|^2.

Yuan et al. 2024, https://arxiv.org/abs/2405.17484, section 3. Neither W nor a matrix [d, d] is needed: with unit vectors as
the columns of U the product is I - U T U^T, where the inverse of T has 1/2 on its diagonal and the products u_i^T u_j above it
(Schreiber and Van Loan 1989, https://doi.org/10.1137/0910005).

The vectors start as equal pairs, and a reflection undoes itself. So an untrained delta is a no-op up to rounding only.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BareLayer, DeltaModule, Design, Method, Target, wants_start_values, wide
from deltakit.errors import OptionError
from deltakit.ops import INPUTS_OF_QUERIES_AND_VALUES, InputMap, kaiming_uniform, like


class HRADelta(InputMap):
    """Reflects its target's input. The rows of `u` [r, d] are the vectors; the last one comes first."""

    def __init__(self, target: Target, r: int) -> None:
        super().__init__(target)
        self.u = nn.Parameter(torch.empty(r, self.size, **like(target)))
        if wants_start_values(self.u):
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        half = torch.empty_like(self.u[::2])
        kaiming_uniform(half)
        self.u.copy_(half.repeat_interleave(2, 0))

    def factors(self) -> tuple[Float[Tensor, "r d"], Float[Tensor, "r d"]]:
        """Returns U^T and T U^T, in float32 or wider: the product of all reflections is I - U T U^T."""
        u = nn.functional.normalize(wide(self.u), dim=-1)
        inverse = torch.triu(u @ u.mT, 1) + 0.5 * torch.eye(len(u), dtype=u.dtype, device=u.device)
        return u, torch.linalg.solve_triangular(inverse, u, upper=True)

    def into(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        u, tu = (factor.to(x.dtype) for factor in self.factors())
        return x - x @ tu.mT @ u

    def linear_update(self, layer: BareLayer) -> tuple[Tensor, None]:
        # A convolution has one weight for each position in its kernel.
        weight = layer.weight.unflatten(-1, (self.size, -1)).mT
        u, tu = (factor.to(weight) for factor in self.factors())
        return -(weight @ u.mT @ tu).mT.flatten(1), None

    def summary(self) -> str:
        return f"r={len(self.u)}"


@dataclass(frozen=True, kw_only=True)
class HRA(Method, name="hra"):
    """Householder reflection adaptation: trained reflections of the inputs of linear layers.

    Args:
        r: the number of reflections; even, because the vectors start in equal pairs.

    Raises:
        OptionError: if `r` is odd or below 2.
    """

    kind: ClassVar[type[DeltaModule]] = HRADelta
    design: ClassVar[Design] = Design(form="H_1 ... H_r x, H_i = I - 2 u_i u_i^T / |u_i|^2")
    identity: ClassVar[bool] = False

    r: int = 8

    def validate(self) -> None:
        if self.r < 2 or self.r % 2:
            raise OptionError(
                f"HRA(r={self.r}): expected an even number of at least 2, because reflections start in pairs that undo each "
                "other; 8 is usual"
            )

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return INPUTS_OF_QUERIES_AND_VALUES

    def build_at(self, target: Target) -> DeltaModule:
        return HRADelta(target, self.r)
