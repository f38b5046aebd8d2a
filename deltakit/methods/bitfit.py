"""BitFit: y = y + b.  Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199, section 3.

The paper trains the existing biases. Here a second bias, zero at the start, is added to them. So an untrained BitFit is the
identity, it can be removed, and it also works on layers without a bias (Llama, T5).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import BareLayer, DeltaModule, Design, FeatureSlice, Method, Target, WeightView, wide
from deltakit.errors import OptionError
from deltakit.ops import OutputMap, WeightMap, like, take_weighted_sum

# The paper's smaller variant (section 3, "b_q and b_m2"): the query's bias and that of the first feed-forward layer.
_QUERY_MLP = (("attn.q", "attn.qkv"), ("ff.up", "ff.gate_up"))
_ALL = (
    *(("attn.qkv", "attn.kv", f"attn.{part}") for part in ("k", "v")),
    ("attn.qkv", "attn.q"),
    *((f"attn.{part}",) for part in ("q_a", "kv_a", "o")),
    *((f"ff.{part}",) for part in ("up", "gate", "gate_up", "down")),
    ("norm",),
)
_SUBSETS = {"all": _ALL, "query_mlp": _QUERY_MLP}


class BitFitDelta(OutputMap):
    """Adds a `bias` [d] to a module's output, with one value per channel for convolutions."""

    has_weight_form: ClassVar[bool] = True

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.bias = nn.Parameter(torch.zeros(self.size, **like(target)))

    def forward(self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return y + self.bias

    def linear_update(self, layer: BareLayer) -> tuple[None, Float[Tensor, " d"]]:
        return None, wide(self.bias)

    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return take_weighted_sum(self, "bias", parts)


class BitFitPatchDelta(WeightMap):
    """Adds a `bias` to a bias that is read directly. It has the shape of that bias, or of a feature slice of it."""

    reads_weight: ClassVar[bool] = False

    def __init__(self, target: Target, view: WeightView) -> None:
        super().__init__(target, view)
        held = target.module._parameters[view.name]
        shape = [] if held is None else [view.feature_slice.size] if view.feature_slice else list(held.shape)
        self.bias = nn.Parameter(torch.zeros(shape, **like(target)))

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        return True

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return wide(self.bias)

    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return take_weighted_sum(self, "bias", parts)


@dataclass(frozen=True, kw_only=True)
class BitFit(Method, name="bitfit"):
    """A trained bias, added to the output of every linear layer and norm.

    Args:
        subset: "all", or "query_mlp" for the paper's smaller variant (the query and the first feed-forward layer).

    Raises:
        OptionError: if `subset` has another value, or both `at` and `subset="query_mlp"` are given.
    """

    design: ClassVar[Design] = Design(form="b", changes="output", insertion="parallel", composition="addition")

    subset: str = "all"

    def validate(self) -> None:
        if self.subset not in _SUBSETS:
            raise OptionError(f"BitFit(subset={self.subset!r}): expected one of {', '.join(_SUBSETS)}")
        if self.subset != "all" and self.at is not None:
            raise OptionError(
                f"BitFit(subset={self.subset!r}, at={self.at!r}): both choose the targets; omit one of them"
            )

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return _SUBSETS[self.subset]

    def kind_at(self, target: Target) -> type[DeltaModule] | None:
        if not target.never_called and (target.weight_read is None or not _bias_name(target)):
            return BitFitDelta
        return BitFitPatchDelta if _bias_name(target) else None

    def build_at(self, target: Target) -> DeltaModule:
        if self.kind_at(target) is BitFitDelta:
            return BitFitDelta(target)
        return BitFitPatchDelta(target, WeightView(_bias_name(target), feature_slice=_bias_slice(target)))


def _bias_name(target: Target) -> str:
    """Returns the name of the bias that is read directly together with the target's weight; "" if there is none.

    If the target is a bias itself, that is its own name.
    """
    own = target.module._parameters
    read = target.parameter or "weight"
    if isinstance(target.module, nn.MultiheadAttention):
        names = ["in_proj_bias"]
    else:
        names = [read.replace("weight", "bias"), f"{read}_bias"] if "weight" in read else [f"{read}_bias"]
    if "bias" in read:
        names = [read]
    return next((name for name in names if own.get(name) is not None), "")


def _bias_slice(target: Target) -> FeatureSlice | None:
    """Returns the feature slice of the bias that belongs to the target."""
    # torch's attention has one bias for queries, keys and values together, even if their weights are separate parameters.
    module, first = target.module, target.parameter[:1]
    if target.feature_slice is not None or not isinstance(module, nn.MultiheadAttention) or first not in "qkv":
        return target.feature_slice
    size, number = module.embed_dim, "qkv".index(first)
    return FeatureSlice(first, 1, 3 * size, number * size, (number + 1) * size)
