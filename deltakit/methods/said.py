"""SAID: all weights change within one random subspace of few dimensions, dW_i = λ_i P_i θ.

Aghajanyan et al. 2021, https://arxiv.org/abs/2012.13255, section 3: structure-aware intrinsic dimension. One vector θ is
shared by all targets, P_i is a fixed Fastfood projection, and λ_i one trained number for each target. Without λ it is the
intrinsic dimension of Li et al. 2018 (https://arxiv.org/abs/1804.08838). θ starts at zero, so an untrained delta is the
identity. A file has θ, λ and the seed of the projections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Design, Method, Target, gathered_in_training
from deltakit.errors import OptionError, TargetError
from deltakit.ops import Fastfood, WeightMap, key_of_name, like


class Subspace(nn.Module):
    """The vector `theta` [size], and the projections to the weights of all targets."""

    def __init__(self, size: int, seed: int, target: Target) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, **like(target)))
        self.projection = Fastfood(size, seed, self.theta.device)


class SAIDDelta(WeightMap):
    """Adds `factor` (λ) times the projection of the shared θ that belongs to its target."""

    def __init__(self, target: Target, options: "SAID") -> None:
        super().__init__(target)
        self.projection_key = key_of_name(target.path)
        self.factor = nn.Parameter(torch.ones(1, **like(target))) if options.structured else None

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        # A copy, because torch's FLOP counter refuses a module that is called with a parameter in a backward pass.
        theta = gathered_in_training(self.shared.theta).clone()
        update: Tensor = self.shared.projection(theta, self.projection_key, tuple(weight.shape))
        return update if self.factor is None else update * self.factor.to(update)

    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        raise TargetError(
            "SAID has no weighted sums, because all its targets share one theta; run the deltas one by one"
        )

    def summary(self) -> str:
        return f"size={len(self.shared.theta)}"


@dataclass(frozen=True, kw_only=True)
class SAID(Method, name="said"):
    """All weights of the targets change within one random subspace of few dimensions.

    A weight patch computes a full weight in each forward, and a layer that is called its product, so a step is slower than
    LoRA's; the update is computed again in the backward pass instead of being kept.

    Args:
        size: the number of trained values in all, at least 1 more than there are targets if `structured` is set.
        structured: whether each target has a trained factor λ of its own, which counts in `size`. If not, there is only θ.
        seed: the seed of the projections, at least 0. It is in the file, and the projections are not.

    Raises:
        OptionError: if an option is out of its range.
    """

    design: ClassVar[Design] = Design(form="l P theta x, P fixed and random")

    size: int = 20_000
    structured: bool = True
    seed: int = 0

    def validate(self) -> None:
        if self.size < 1:
            raise OptionError(f"SAID(size={self.size}): expected at least 1")
        if not 0 <= self.seed < 2**31:
            raise OptionError(f"SAID(seed={self.seed}): expected a number from 0 to 2**31 - 1")

    def positions(self) -> tuple[tuple[str, ...], ...]:
        attention = (("attn.q", "attn.qkv"), ("attn.k", "attn.kv"), ("attn.v",), ("attn.o",))
        return (*attention, ("ff.up", "ff.gate_up"), ("ff.gate",), ("ff.down",))

    def kind_at(self, target: Target) -> type[DeltaModule] | None:
        return SAIDDelta

    def build_at(self, target: Target) -> DeltaModule:
        return SAIDDelta(target, self)

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module:
        size = self.size - len(targets) * self.structured
        if size < 1:
            raise OptionError(
                f"SAID(size={self.size}): {len(targets)} targets have a factor each, which leaves nothing for the subspace; "
                f"pass size={len(targets) + 1} or more, or structured=False"
            )
        return Subspace(size, self.seed, targets[0])
