"""LoHa: dW = s (B1 A1) * (B2 A2), an element-wise product of two low-rank matrices, which has a rank of up to r^2.

Hyeon-Woo et al. 2021 (FedPara), https://arxiv.org/abs/2108.06098; LyCORIS, Yeh et al. 2023,
https://arxiv.org/abs/2309.14859. The start values are those of LyCORIS: B2 is zero. On convolutions with
`tucker=True` each of the two matrices is B (core) A with a core for each position in the kernel.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Target, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import WeightMap, WeightMethod, check_alpha, kernel_of, like, matrix_sizes, stack_of


class LoHaDelta(WeightMap):
    """The factors `A1`, `A2` [*stack, r, d_in] and `B1`, `B2` [*stack, d_out, r].

    With `tucker`, d_in is the number of channels, B1 and B2 are [r, d_out], and `core1` and `core2` [r, r, positions] have a
    matrix for each position in the kernel.
    """

    reads_weight: ClassVar[bool] = False

    def __init__(self, target: Target, options: "LoHa") -> None:
        super().__init__(target)
        self.scaling = options.alpha / options.r
        r, stack, positions = options.r, stack_of(target), kernel_of(target).numel()
        d_in, d_out = matrix_sizes(target, "LoHa")
        tucker = options.tucker and positions > 1
        shapes = {"A": (*stack, r, d_in * positions), "B": (*stack, d_out, r)}
        if tucker:
            shapes = {"A": (r, d_in), "B": (r, d_out), "core": (r, r, positions)}
        for which in "12":
            for name, shape in shapes.items():
                setattr(self, f"{name}{which}", nn.Parameter(torch.empty(shape, **like(target))))
        if wants_start_values(self.get_parameter("A1")):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.1 if name == "B1" or name.startswith("core") else 1)
        nn.init.zeros_(self.get_parameter("B2"))

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.scaling * self._matrix("1", weight.dtype) * self._matrix("2", weight.dtype)

    def _matrix(self, which: str, dtype: torch.dtype) -> Float[Tensor, "*stack d_out d_in"]:
        own = {name: parameter.to(dtype) for name, parameter in self._parameters.items() if parameter is not None}
        a, b, core = own[f"A{which}"], own[f"B{which}"], own.get(f"core{which}")
        return b @ a if core is None else torch.einsum("io,ijk,jc->ock", b, core, a).flatten(1)

    def summary(self) -> str:
        r = self.get_parameter("A1").shape[-2]
        return f"r={r} alpha={self.scaling * r:g}" + (" tucker" if "core1" in self._parameters else "")


@dataclass(frozen=True, kw_only=True)
class LoHa(WeightMethod, name="loha"):
    """Updates that are element-wise products of two low-rank matrices.

    The full update is computed in each forward, and again in the backward pass instead of being kept.

    Args:
        r: the rank of each of the two matrices, at least 1.
        alpha: the update is multiplied by alpha / r; at least 0.
        tucker: whether convolutions have the Tucker form, which needs fewer parameters for large kernels.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range.
    """

    kind: ClassVar[type[DeltaModule]] = LoHaDelta
    design: ClassVar[Design] = Design(form="((B1 A1) * (B2 A2)) x", composition="scaled addition")
    on_stacks: ClassVar[bool] = True

    r: int = 8
    alpha: float = 8
    tucker: bool = False

    def validate(self) -> None:
        if self.r < 1:
            raise OptionError(f"LoHa(r={self.r}): expected a rank of at least 1; 8 is usual")
        check_alpha("LoHa", self.alpha)
