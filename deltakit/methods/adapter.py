"""Adapter: y = y + f(y W_d + b_d) W_u + b_u.  Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, section 2.1.

It stands after the output projection of the attention and of the feed-forward part, before the residual is added
(figure 2). The authors initialise both weights near zero; here W_u is exactly zero, so that an untrained adapter is the
identity. Size 64 and GELU are the defaults of the authors' code; they train the layer norms too: `norms=True`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, FeatureSlice, Method, Target
from deltakit.errors import OptionError
from deltakit.ops import like, output_size
from deltakit.selection import feature_axis, features_last

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class AdapterDelta(DeltaModule):
    """A bottleneck: `down` [size, d] and `up` [d, size], with biases, and an activation between.

    `axis`: the dimension of the features in what the target gives.
    """

    def __init__(
        self, d: int, size: int, activation: str, axis: int = -1, feature_slice: FeatureSlice | None = None, **like: Any
    ) -> None:
        super().__init__()
        self.activation, self.axis, self.feature_slice = activation, axis, feature_slice
        self.down = nn.Linear(d, size, **like)
        self.up = nn.Linear(size, d, **like)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Truncated normal with 1e-3 as in the authors' code (feedforward_adapter).
        nn.init.trunc_normal_(self.down.weight, std=1e-3, a=-2e-3, b=2e-3)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        size = self.feature_slice.total if self.feature_slice else self.down.in_features
        last = features_last(y, self.axis, size)
        part = self.feature_slice.take(last) if self.feature_slice else last
        update = self.up(ACTIVATIONS[self.activation](self.down(part.to(self.down.weight.dtype))))
        update = self.feature_slice.spread(update) if self.feature_slice else update
        return y + features_last(update, self.axis, y.shape[-1]).to(y.dtype)

    def summary(self) -> str:
        return f"size={self.down.out_features} {self.activation}"


@dataclass(frozen=True, kw_only=True)
class Adapter(Method, name="adapter"):
    """Bottleneck adapters in sequence with what they adapt.

    `size`: the bottleneck in elements, at least 1; or `reduction`: the features' size divided by this number.
    `activation`: gelu, gelu_tanh, relu, silu or tanh. `norms`: train the backbone's layer norms whole beside the adapters.
    """

    size: int | None = None
    reduction: int | None = None
    activation: str = "gelu"
    norms: bool = False

    default_at: ClassVar = (("attn.o", "attn"), ("ff.down", "ff"))

    def validate(self) -> None:
        if self.size is not None and self.reduction is not None:
            raise OptionError(f"Adapter(size={self.size}, reduction={self.reduction}): give one of them, not both")
        for option in ("size", "reduction"):
            value = getattr(self, option)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"Adapter({option}={value!r}): an integer of at least 1, or None")
        if self.activation not in ACTIVATIONS:
            raise OptionError(f"Adapter(activation={self.activation!r}): one of {', '.join(ACTIVATIONS)}")

    def build_at(self, target: Target) -> DeltaModule:
        d = output_size(target, self.name)
        size = max(1, d // self.reduction) if self.reduction else self.size or 64
        return AdapterDelta(d, size, self.activation, feature_axis(target.module), target.feature_slice, **like(target))

    def train_also(self) -> tuple[str, ...]:
        return ("@norm",) if self.norms else ()
