"""IA3: learned scales on keys, values and the inner features of feed-forward parts.

Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3: softmax(q (l_k * k)^T) (l_v * v), and (l_ff * f(W_1 x)) W_2.
The third scale multiplies the input of the feed-forward output projection, after the activation and the gate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import BareLayer, DeltaModule, Design, Method, Target, wide
from deltakit.errors import OptionError, TargetError
from deltakit.ops import InputMap, OutputMap, like


class IA3Delta(OutputMap):
    """Multiplies the target's output by `scale` [d], which starts at one."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.scale = nn.Parameter(torch.ones(self.size, **like(target)))

    def forward(self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return y * self.scale

    def linear_update(self, layer: BareLayer) -> tuple[Tensor, Tensor | None]:
        change = self.scale - 1
        return change[:, None] * layer.weight, None if layer.bias is None else change * layer.bias

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return _take_sum(self.scale, parts)


class IA3InputDelta(InputMap):
    """Multiplies the target's input by `scale` [d], which starts at one."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.scale = nn.Parameter(torch.ones(self.size, **like(target)))

    def into(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return x * self.scale

    def linear_update(self, layer: BareLayer) -> tuple[Tensor, None]:
        weight = layer.weight
        # A convolution has one weight for each position in its kernel.
        positions = weight.shape[-1] // self.size
        return weight * (self.scale - 1).repeat_interleave(positions), None

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return _take_sum(self.scale, parts)


def _take_sum(scale: Float[Tensor, " d"], parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
    change = torch.stack([weight * (wide(part.get_parameter("scale")) - 1) for weight, part in parts]).sum(0)
    scale.copy_(1 + change)
    return 0.0, float(change.square().sum())


@dataclass(frozen=True, kw_only=True)
class IA3(Method, name="ia3"):
    """Trained scales on keys, values and the input of the feed-forward output projection.

    Args:
        side: "auto" scales the input of targets with the role @ff.down, and the output of all others. "input" or "output"
            sets it for all targets.

    Raises:
        OptionError: if `side` has another value.
    """

    design: ClassVar[Design] = Design(form="l * y or l * x", changes="output or input", composition="product")

    side: str = "auto"

    def validate(self) -> None:
        if self.side not in ("auto", "input", "output"):
            raise OptionError(f"IA3(side={self.side!r}): expected 'auto', 'input' or 'output'")

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return (("attn.k",), ("attn.v",), ("ff.down",))

    def kind_at(self, target: Target) -> type[DeltaModule] | None:
        if target.never_called:
            return None
        into = "ff.down" in target.roles if self.side == "auto" else self.side == "input"
        return IA3InputDelta if into else IA3Delta

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> Method:
        sides = {"input" if isinstance(part, IA3InputDelta) else "output" for part in parts}
        if len(sides) > 1:
            raise TargetError(
                "IA3 has no sum of a scale on the input of a layer and one on its output; run them one by one"
            )
        return cls(side=sides.pop())
