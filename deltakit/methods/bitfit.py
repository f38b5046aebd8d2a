"""BitFit: y = y + b.  Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199, section 3.

The paper trains the biases that there are. Here an added bias starts at zero, so that it is the identity untrained,
can be taken off again, and stands on layers without a bias too (Llama, T5).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, FeatureSlice, Method, Target, wide
from deltakit.errors import OptionError, TargetError
from deltakit.ops import like, output_size
from deltakit.selection import along, feature_axis

# The paper's smaller variant (section 3, "b_q and b_m2"): the query's bias and that of the first feed-forward layer.
_SUBSETS = {"all": None, "query_mlp": (("attn.q", "attn.qkv"), ("ff.up", "ff.gate_up"))}


class BitFitDelta(DeltaModule):
    """An added `bias`, zero at the start: [d] on a module, of the parameter's shape on one that is read.

    On a convolution it is one value a channel. `axis`: the dimension of the features in what the target gives; `name`: the
    parameter that it is added to by weight.
    """

    def __init__(
        self,
        shape: Sequence[int],
        axis: int = -1,
        feature_slice: FeatureSlice | None = None,
        name: str = "bias",
        **like: Any,
    ) -> None:
        super().__init__()
        self.axis, self.feature_slice, self.name = axis, feature_slice, name
        self.bias = nn.Parameter(torch.empty(*shape, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        bias = self.feature_slice.spread(self.bias) if self.feature_slice else self.bias
        return y + along(bias, self.axis, y.ndim).to(y.dtype)

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        terms = [weight * wide(part.get_parameter("bias")) for weight, part in parts]
        self.bias.copy_(torch.stack(terms).sum(0))
        return 0.0, float(wide(self.bias).square().sum())

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        if not isinstance(getattr(target, self.name, None), Tensor):
            raise TargetError(
                f"a {type(target).__name__} without a bias has nothing to merge BitFit into; leave it attached"
            )
        return {self.name: wide(self.feature_slice.spread(self.bias) if self.feature_slice else self.bias)}


@dataclass(frozen=True, kw_only=True)
class BitFit(Method, name="bitfit"):
    """An added bias on every linear layer and norm. `subset`: "all", or "query_mlp" for the paper's smaller variant."""

    subset: str = "all"

    weights: ClassVar = True
    default_at: ClassVar = (
        *(("attn.qkv", "attn.kv", f"attn.{part}") for part in ("k", "v")),
        ("attn.qkv", "attn.q"),
        *((f"attn.{part}",) for part in ("q_a", "kv_a", "o")),
        *((f"ff.{part}",) for part in ("up", "gate", "gate_up", "down")),
        ("norm",),
    )

    def validate(self) -> None:
        if self.subset not in _SUBSETS:
            raise OptionError(f"BitFit(subset={self.subset!r}): one of {', '.join(_SUBSETS)}")
        if self.subset != "all" and self.at is not None:
            raise OptionError(f"BitFit(subset={self.subset!r}, at={self.at!r}): both say where; give one of them")

    @property
    def default_roles(self) -> tuple[tuple[str, ...], ...]:
        return _SUBSETS[self.subset] or self.default_at

    def serves(self, target: Target) -> bool:
        return bool(_bias_name(target)) if self._is_read(target) else True

    def by_weight(self, target: Target) -> bool:
        return bool(target.parameter) or (super().by_weight(target) and bool(_bias_name(target)))

    def _is_read(self, target: Target) -> bool:
        return bool(target.parameter or (target.weight_read and target.weight_read.never_called))

    def build_at(self, target: Target) -> DeltaModule:
        module = target.module
        if self._is_read(target):
            name = _bias_name(target)
            if not name:
                raise TargetError(
                    f"{target.path}: its {type(module).__name__} reads this weight and has no bias of its own: there is "
                    "nothing that BitFit could be added to; leave it out with exclude="
                )
            rows = _bias_slice(target)
            bias = module._parameters[name]
            shape = [rows.size] if rows else list(bias.shape) if bias is not None else []
            return BitFitDelta(shape, -1, rows, name, **like(target))
        return BitFitDelta([output_size(target, self.name)], feature_axis(module), target.feature_slice, **like(target))


def _bias_name(target: Target) -> str:
    """The parameter that is the bias of what is read: a bias itself, or what is called like the bias to a weight."""
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
    """Torch's attention keeps the biases of queries, keys and values in one, also where the weights stand alone."""
    module, first = target.module, target.parameter[:1]
    if target.feature_slice is not None or not isinstance(module, nn.MultiheadAttention) or first not in "qkv":
        return target.feature_slice
    size, place = module.embed_dim, "qkv".index(first)
    return FeatureSlice(first, 1, 3 * size, place * size, (place + 1) * size)
