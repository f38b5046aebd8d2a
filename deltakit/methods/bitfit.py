"""BitFit: y = y + b.  Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199, section 3.

The paper trains the biases that there are. Here an added bias starts at zero, so that it is the identity untrained,
can be taken off again, and stands on layers without a bias too (Llama, T5).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.errors import OptionError, TargetError
from deltakit.method import DeltaModule, Method, Target
from deltakit.shapes import like, output_size, wide

# The paper's smaller variant (section 3, "b_q and b_m2"): the query's bias and that of the first feed-forward layer.
_SUBSETS = {"all": None, "query_mlp": (("attn.q", "attn.qkv"), ("ff.up", "ff.gate_up"))}


class BitFitDelta(DeltaModule):
    """An added `bias` [d], zero at the start. On a convolution it is one value a channel."""

    def __init__(self, d: int, channels_first: int, **like: Any) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.bias = nn.Parameter(torch.empty(d, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return y + self.bias.view(-1, *[1] * self.channels_first).to(y.dtype)

    def weight_update(self, target: nn.Module) -> Mapping[str, Tensor]:
        if not isinstance(getattr(target, "bias", None), Tensor):
            raise TargetError(
                f"a {type(target).__name__} without a bias has nothing to merge BitFit into; leave it attached"
            )
        return {"bias": wide(self.bias)}


@dataclass(frozen=True, kw_only=True)
class BitFit(Method, name="bitfit"):
    """An added bias on every linear layer and norm. `subset`: "all", or "query_mlp" for the paper's smaller variant."""

    subset: str = "all"

    default_at: ClassVar = (
        *((f"attn.{part}",) for part in ("q", "k", "v", "kv", "qkv", "o")),
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

    def build_at(self, target: Target) -> DeltaModule:
        convolution = isinstance(target.module, nn.modules.conv._ConvNd)
        spatial = len(target.module.kernel_size) if convolution else 0  # type: ignore[arg-type]
        return BitFitDelta(output_size(target, self.name), spatial, **like(target))
