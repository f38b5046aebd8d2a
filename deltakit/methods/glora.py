"""GLoRA: one form for changes of a layer's weight and of its bias.

Chavan et al. 2023, https://arxiv.org/abs/2306.07967: W + W * A + B and b + b * D + E + W C, where * is element by element. The
paper searches a form for each of A to E in each layer: low-rank, a vector, one number, or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, PerTarget, Target, one_value, values_of, wants_start_values
from deltakit.errors import OptionError, TargetError
from deltakit.ops import WeightMap, WeightMethod, check_rank, kaiming_uniform, like, sizes


class GLoRADelta(WeightMap):
    """Changes a weight to W + W * A + B, and a bias to b + b * D + E + W C. Low-rank parts are `A_up @ A_down`."""

    tags: ClassVar[Mapping[str, str]] = {f"{part}_{side}": side for part in "ABC" for side in ("up", "down")}

    def __init__(self, target: Target, options: "GLoRA") -> None:
        super().__init__(target)
        d_in, d_out = sizes(target, self.word())
        self.r, self.ab = one_value(options.r), one_value(options.ab)
        self.c, self.de = (one_value(options.c), one_value(options.de)) if self.has_bias else ("none", "none")
        self.changes_weight, self.changes_bias = self.ab != "none", {self.c, self.de} != {"none"}
        if self.ab == "lora":
            check_rank(target, "GLoRA", self.r)
        shapes = {
            **_shapes("A", self.ab, (d_out, self.r, d_in), (d_out, 1)),
            **_shapes("B", self.ab, (d_out, self.r, d_in), (d_out, 1)),
            **_shapes("C", self.c, (d_in, self.r, 1), (d_in, 1)),
            **_shapes("D", self.de, (), (d_out,)),
            **_shapes("E", self.de, (), (d_out,)),
        }
        if not shapes:
            raise TargetError(
                f"{target.named}: it has no bias, and GLoRA(ab='none') changes nothing else; use another ab, or leave it out "
                "with exclude="
            )
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **like(target))))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("_down") and wants_start_values(parameter):
                kaiming_uniform(parameter)
            elif not name.endswith("_down"):
                nn.init.zeros_(parameter)

    def weight_update(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return weight * self._part("A", weight) + self._part("B", weight)

    def bias_update(
        self, weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"]
    ) -> Float[Tensor, " d_out"]:
        update = torch.zeros_like(bias)
        if self.de != "none":
            update = bias * self._part("D", bias) + self._part("E", bias)
        return update if self.c == "none" else update + (weight @ self._part("C", weight)).squeeze(-1)

    def _part(self, name: str, other: Tensor) -> Tensor:
        """Returns A, B, C, D or E in the dtype of another tensor."""
        if name in self._parameters:
            return getattr(self, name).to(other.dtype)
        up, down = (getattr(self, f"{name}_{side}").to(other.dtype) for side in ("up", "down"))
        return up @ down

    def summary(self) -> str:
        rank = [f"r={self.r}"] if "lora" in (self.ab, self.c) else []
        return " ".join([*rank, f"ab={self.ab}", f"c={self.c}", f"de={self.de}"])


@dataclass(frozen=True, kw_only=True)
class GLoRA(WeightMethod, name="glora"):
    """W + W * A + B and b + b * D + E + W C, with each of A to E low-rank, a vector, one number, or left out.

    C, D and E are only at targets with a bias. Each option may differ between targets, as the paper's search finds them:
    `GLoRA(ab={"layers.{0-5}": "vector", "*": "lora"})`.

    Args:
        r: the rank of low-rank parts, at least 1.
        ab: the form of A and B: "lora", "vector" for one number per output feature, "constant" or "none".
        c: the form of C: "lora", "vector" for one number per input feature, or "none".
        de: the form of D and E: "vector", "constant" or "none".
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if `r` is below 1, or nothing is left to train.
    """

    kind: ClassVar[type[DeltaModule]] = GLoRADelta
    design: ClassVar[Design] = Design(form="(W * A + B) x + b * D + E + W C")
    per_target: ClassVar[tuple[str, ...]] = ("r", "ab", "c", "de")

    r: PerTarget[int] = 8
    ab: PerTarget[Literal["lora", "vector", "constant", "none"]] = "lora"
    c: PerTarget[Literal["lora", "vector", "none"]] = "lora"
    de: PerTarget[Literal["vector", "constant", "none"]] = "constant"

    def validate(self) -> None:
        if not all(r >= 1 for r in values_of(self.r)):
            raise OptionError(f"GLoRA(r={self.r}): expected a rank of at least 1; 8 is usual")
        if {*values_of(self.ab), *values_of(self.c), *values_of(self.de)} == {"none"}:
            raise OptionError("GLoRA(ab='none', c='none', de='none'): nothing is left to train; ab='lora' is usual")


def _shapes(name: str, form: str, product: tuple[int, ...], vector: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of A, B, C, D or E.

    Args:
        product: rows, rank and columns of a low-rank matrix.
        vector: the shape of a vector.
    """
    if form == "lora":
        return {f"{name}_up": product[:2], f"{name}_down": product[1:]}
    return {name: vector if form == "vector" else (1,) * len(vector)} if form != "none" else {}
