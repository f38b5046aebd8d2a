"""VB-LoRA: LoRA whose factors are put together from the vectors of one trained bank, which all targets share.

Li et al. 2024, https://arxiv.org/abs/2405.15179. Each part of `length` entries of a row of A, or of a column of B, is the
sum of the `top` bank vectors with the largest logits, weighted by the softmax of these logits. Bank and logits start at
random, so an untrained delta changes the outputs: both factors come from one bank, and none of them can be zero alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Design, Target, gathered_in_training, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import LowRank, LowRankMethod, like


class VectorBank(nn.Module):
    """The vectors `bank` [vectors, length]."""

    def __init__(self, vectors: int, length: int, **like: Any) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.empty(vectors, length, **like))
        if wants_start_values(self.bank):
            nn.init.uniform_(self.bank, -0.02, 0.02)

    def forward(self) -> Float[Tensor, "vectors length"]:
        return gathered_in_training(self.bank)


class VBLoRADelta(LowRank):
    """The logits `logits_A` [r, d_in / length, vectors] and `logits_B` [d_out / length, r, vectors]."""

    tags: ClassVar[Mapping[str, str]] = {"logits_A": "logits", "logits_B": "logits", "shared": "bank"}

    def __init__(self, target: Target, options: "VBLoRA") -> None:
        super().__init__(target, dropout=options.dropout)
        self.top, length = options.top, options.length
        if self.d_in % length or self.d_out % length:
            raise OptionError(
                f"{target.named}: VBLoRA(length={length}) expects sizes that it divides, and the layer has {self.d_in} to "
                f"{self.d_out} features; use another length, or leave it out with exclude="
            )
        r, vectors = options.r, options.vectors
        self.logits_A = nn.Parameter(torch.empty(r, self.d_in // length, vectors, **like(target)))
        self.logits_B = nn.Parameter(torch.empty(self.d_out // length, r, vectors, **like(target)))
        if wants_start_values(self.logits_A):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.logits_A, std=0.1)
        nn.init.normal_(self.logits_B, std=0.1)

    def factors(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        bank = self.shared().to(self.logits_A)
        return self._mixed(self.logits_A, bank).flatten(1), self._mixed(self.logits_B, bank).mT.flatten(0, 1)

    def _mixed(
        self, logits: Float[Tensor, "rows columns vectors"], bank: Float[Tensor, "vectors length"]
    ) -> Float[Tensor, "rows columns length"]:
        values, chosen = logits.topk(self.top, dim=-1)
        return (values.softmax(-1)[..., None] * bank[chosen]).sum(-2)

    def summary(self) -> str:
        return f"r={len(self.logits_A)} top={self.top} of {self.logits_A.shape[-1]}"


@dataclass(frozen=True, kw_only=True)
class VBLoRA(LowRankMethod, name="vblora"):
    """Low-rank updates from one trained bank of vectors. A weighted sum of several is a LoRA.

    Args:
        r: the rank, at least 1.
        vectors: the number of vectors in the bank, at least `top`.
        length: the length of a vector, at least 1. It must divide the layers' sizes.
        top: the number of vectors that each part is made of, at least 1.
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range, or the length does not divide the sizes of a target.
    """

    kind: ClassVar[type[DeltaModule]] = VBLoRADelta
    design: ClassVar[Design] = Design(form="B A x, A and B from one bank")
    identity: ClassVar[bool] = False

    r: int = 4
    vectors: int = 256
    length: int = 256
    top: int = 2

    def validate(self) -> None:
        super().validate()
        for option in ("r", "length", "top"):
            value = getattr(self, option)
            if value < 1:
                raise OptionError(f"VBLoRA({option}={value}): expected at least 1")
        if self.vectors < self.top:
            raise OptionError(
                f"VBLoRA(vectors={self.vectors}, top={self.top}): expected at least as many vectors as top"
            )

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module:
        return VectorBank(self.vectors, self.length, **like(targets[0]))
