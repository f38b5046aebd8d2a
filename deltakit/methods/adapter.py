"""Adapter: y = y + f(y W_d + b_d) W_u + b_u.  Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, section 2.1.

It follows the output projection of the attention and of the feed-forward part, before the residual is added (figure 2). The
authors initialise both weights near zero. Here W_u is exactly zero, so that an untrained adapter is the identity. Size 64 and
GELU are the defaults of the authors' code. The authors also train the layer norms: attach with `train="@norm"` for that.

Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, section 3, have one adapter a layer, which reads the norm behind the
residual and adds to that residual: `add_to="input"` on this norm.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import DeltaModule, Target, wants_start_values
from deltakit.ops import Bottleneck, BottleneckMethod, like, unfilled_linear


class AdapterDelta(Bottleneck):
    """A bottleneck: the linear layers `down` [size, d] and `up` [d, size] with biases, and an activation between them."""

    down: nn.Linear
    up: nn.Linear

    def __init__(self, target: Target, options: "Adapter") -> None:
        super().__init__(target, options, options.add_to)
        size = options.bottleneck(self.size)
        self.down = unfilled_linear(self.size, size, **like(target))
        self.up = unfilled_linear(size, self.size, **like(target))
        if options.gate:
            self.add_gate(self.size, target)
        if wants_start_values(self.down.weight):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        # Truncated normal with 1e-3 as in the authors' code (feedforward_adapter).
        nn.init.trunc_normal_(self.down.weight, std=1e-3, a=-2e-3, b=2e-3)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return y + self.change(y if self.add_to == "output" else x)

    def summary(self) -> str:
        return f"size={self.down.out_features} {self.words}"


@dataclass(frozen=True, kw_only=True)
class Adapter(BottleneckMethod, name="adapter"):
    """Bottleneck adapters, applied to the output of their targets.

    Args:
        size: the size of the bottleneck in elements, at least 1; 64 by default.
        reduction: instead of `size`: the number of features is divided by it, at least 1.
        activation: gelu, gelu_tanh, relu, leaky_relu, silu or tanh.
        gate: whether a trained gate multiplies the result: a number in (0, 1) for each example, the mean of those of all
            positions (Mao et al. 2022, https://arxiv.org/abs/2110.07577). In decoders it sees later tokens.
        add_to: "output", or "input" for targets that are norms: what is computed from a norm's output is added to its input,
            so y = N(x + f(N(x) W_d + b_d) W_u + b_u). It is the adapter of Pfeiffer et al. on the last norm of BERT's layers.

    Raises:
        OptionError: if an option is out of its range, or both `size` and `reduction` are given.
    """

    kind: ClassVar[type[DeltaModule]] = AdapterDelta

    add_to: Literal["output", "input"] = "output"

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return (("attn.o", "attn"), ("ff.down", "ff"))

    def build_at(self, target: Target) -> DeltaModule:
        return AdapterDelta(target, self)
