"""GraLoRA: the weight in k x k blocks, each with a low-rank update of its own, at the cost of one LoRA.

Jung et al. 2025, https://arxiv.org/abs/2505.20355. Input block n gives r features A_n x_n. They are cut into k parts, and
part i goes to output block i, whose B_i takes the k parts that it gets. So each of the k^2 blocks has an update of rank r / k.
A plain LoRA of rank `hybrid` may stand beside it. B starts at zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Target, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import LowRank, LowRankMethod, check_alpha, kaiming_uniform, like


class GraLoRADelta(LowRank):
    """The factors `A` [k, r, d_in / k] and `B` [k, d_out / k, r].

    With `hybrid` there are also `A_whole` [hybrid, d_in] and `B_whole` [d_out, hybrid].
    """

    tags: ClassVar[Mapping[str, str]] = {"A": "down", "A_whole": "down", "B": "up", "B_whole": "up"}
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, target: Target, options: "GraLoRA") -> None:
        super().__init__(target, scaling=options.alpha / (options.r + options.hybrid), dropout=options.dropout)
        k, r, hybrid = options.k, options.r, options.hybrid
        if self.d_in % k or self.d_out % k:
            raise OptionError(
                f"{target.named}: GraLoRA(k={k}) expects sizes that k divides, and the layer has {self.d_in} to {self.d_out} "
                "features; use another k, or leave it out with exclude="
            )
        shapes: dict[str, tuple[int, ...]] = {"A": (k, r, self.d_in // k), "B": (k, self.d_out // k, r)}
        if hybrid:
            shapes |= {"A_whole": (hybrid, self.d_in), "B_whole": (self.d_out, hybrid)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, **like(target))))
        if wants_start_values(self.A):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            (kaiming_uniform if name.startswith("A") else nn.init.zeros_)(parameter)

    def factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        a, b = self.A, self.B
        k, r = a.shape[:2]
        # The row n r + i r/k + s of A has the feature s of part i of input block n. Output block i reads those of part i.
        down = torch.block_diag(*a)
        up = torch.zeros(k, b.shape[1], k, k, r // k, dtype=b.dtype, device=b.device)
        up = up.diagonal_scatter(b.unflatten(2, (k, -1)).permute(1, 2, 3, 0), dim1=0, dim2=3).flatten(2).flatten(0, 1)
        whole = self._parameters.get("A_whole"), self._parameters.get("B_whole")
        if whole[0] is None or whole[1] is None:
            return down, up
        return torch.cat([down, whole[0]]), torch.cat([up, whole[1]], dim=1)

    def add_product(
        self, y: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"], scale: float
    ) -> Float[Tensor, "*batch d_out"]:
        # Block by block: half the operations, and no factors with zeros between the blocks that are kept.
        a, b = self.A.to(x.dtype), self.B.to(x.dtype)
        k = len(a)
        # [k, tokens, d_in / k] by [k, d_in / k, r]
        h = x.reshape(-1, self.d_in).unflatten(1, (k, -1)).transpose(0, 1) @ a.mT
        # Part i of all input blocks: [k, tokens, r].
        h = (h.unflatten(2, (k, -1)).permute(2, 1, 0, 3) * scale).flatten(2)
        y = (y.reshape(h.shape[1], k, b.shape[1]) + (h @ b.mT).transpose(0, 1)).reshape(y.shape)
        whole = self._parameters.get("A_whole"), self._parameters.get("B_whole")
        if whole[0] is None or whole[1] is None:
            return y
        return y + F.linear(F.linear(x, whole[0].to(x.dtype)) * scale, whole[1].to(x.dtype))

    def summary(self) -> str:
        k, r, _ = self.A.shape
        return f"r={r} k={k} scale={self.scaling:g}"


@dataclass(frozen=True, kw_only=True)
class GraLoRA(LowRankMethod, name="gralora"):
    """Low-rank updates of blocks of a weight.

    Args:
        r: the rank of an input block, at least 1 and a multiple of k.
        alpha: the update is multiplied by alpha / (r + hybrid); at least 0.
        k: the number of input blocks and of output blocks, at least 1. It must divide the layer's sizes.
        hybrid: the rank of a plain LoRA beside it, at least 0.
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range, or k does not divide the sizes of a target.
    """

    kind: ClassVar[type[DeltaModule]] = GraLoRADelta
    design: ClassVar[Design] = Design(form="B A x in each of k x k blocks")

    r: int = 32
    alpha: float = 64
    k: int = 2
    hybrid: int = 0

    def validate(self) -> None:
        super().validate()
        if self.k < 1 or self.r < 1 or self.r % self.k:
            raise OptionError(f"GraLoRA(r={self.r}, k={self.k}): expected a k of at least 1, and an r that it divides")
        if self.hybrid < 0:
            raise OptionError(f"GraLoRA(hybrid={self.hybrid}): expected a rank of at least 0")
        check_alpha("GraLoRA", self.alpha)
