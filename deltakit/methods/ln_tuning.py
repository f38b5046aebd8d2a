"""LN-tuning: trains the weights and biases of norms.  Zhao et al. 2023, https://arxiv.org/abs/2312.11420, section 3.

Trained is a difference from the backbone's values, which starts at zero. So it can be removed, scaled and summed, and for
every kind of norm it is the same training as that of the values themselves. `train="@norm"` trains the backbone's own
parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Design, Method, Target, wide
from deltakit.errors import RoleError, TargetError
from deltakit.ops import WeightMap, like, take_weighted_sum


class LNTuningDelta(WeightMap):
    """Adds a `change` [d] to one parameter of a norm."""

    reads_weight: ClassVar[bool] = False

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        held = target.module._parameters.get(target.parameter)
        if held is None or not _is_norm(target.module):
            inside = any(map(_is_norm, target.module.children()))
            norms = f"the norms in it, at='{target.owner}/@norm'" if inside else "a norm"
            raise TargetError(
                f"{target.named}: LNTuning trains the weights and biases of norms, found a {type(target.module).__name__}; "
                f"select {norms}, or leave it out with exclude="
            )
        self.change = nn.Parameter(torch.zeros(held.shape, **like(target)))

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, " d"]:
        return wide(self.change)

    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return take_weighted_sum(self, "change", parts)


@dataclass(frozen=True, kw_only=True)
class LNTuning(Method, name="ln_tuning"):
    """Trains the weights and biases of norms: by default of all, or of those that `at` selects."""

    kind: ClassVar[type[DeltaModule]] = LNTuningDelta
    design: ClassVar[Design] = Design(form="w * N(x) + b")

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        if selected is None:
            selected = [index.target(path) for path in index.role("norm")]
            if not any(_is_norm(target.module) for target in selected):
                raise RoleError(f"ln_tuning: {index.owner} has no norm with a weight; use another method")
            selected = [target for target in selected if _is_norm(target.module)]
        return [parameter for target in selected for parameter in _parameters(index, target)]


def _parameters(index: BackboneView, target: Target) -> list[Target]:
    """Returns the parameters of a norm as targets."""
    if target.parameter or not _is_norm(target.module):
        return [target]
    own = [name for name, parameter in target.module._parameters.items() if parameter is not None]
    return [index.target(f"{target.path}.{name}" if target.path else name) for name in own]


def _is_norm(module: nn.Module) -> bool:
    """Returns whether a module has vectors as its own parameters, and no others."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return bool(own) and all(parameter.ndim == 1 for parameter in own)
