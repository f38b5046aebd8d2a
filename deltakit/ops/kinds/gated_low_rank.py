"""Low-rank updates behind a gate: y' = y + g(x) s B A x, with one g in (0, 1) for each example (UniPELT)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import DeltaModule, MixedBatch, Target, hidden_input, hidden_output, replace_hidden
from deltakit.errors import TargetError
from deltakit.ops.example_gates import gate_of, new_gate
from deltakit.ops.kinds.low_rank import LowRank
from deltakit.ops.kinds.maps import on_own_examples


class GatedLowRank(LowRank):
    """Multiplies the product by a gate that reads the layer's input. The author writes `factors()`, and calls `add_gate`.

    It works on linear layers that are called, and on feature slices of them. It is no change of a weight, because each example
    has another one.
    """

    has_weight_form: ClassVar[bool] = False

    gate: nn.Linear

    def add_gate(self, target: Target) -> None:
        """Adds the gate [1, d_in].

        Raises:
            TargetError: if the target is no linear layer.
        """
        if not self.linear:
            raise TargetError(
                f"{target.named}: the gate of {self.word()} reads the hidden states that enter a linear layer, and this is a "
                f"{type(target.module).__name__}; use gate=False, or leave it out with exclude="
            )
        self.gate = new_gate(self.d_in, target)

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        return False

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        y = output if type(output) is Tensor else hidden_output(output)
        new = self(hidden_input(args, kwargs), y)
        return new if y is output else replace_hidden(output, new)

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        return on_own_examples(self, target, args, kwargs, output, batch)

    def forward(
        self,
        x: Shaped[Tensor, "*input"],
        y: Float[Tensor, "*output"],
        layer: nn.Module | None = None,
        alone: bool = False,
    ) -> Float[Tensor, "*output"]:
        """Returns y with the gated product added."""
        a, b = self.whole_factors()
        # The gate multiplies r features instead of d_out.
        low = F.linear(self._dropped(x), a.to(x.dtype))
        low = low * gate_of(self.gate, x.to(self.gate.weight.dtype)).to(low.dtype)
        return y + F.linear(low, b.to(low.dtype)).to(y.dtype)

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return DeltaModule.take_sum(self, parts)

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        raise TargetError(
            f"{self.word()} has a gate with another value for each example, so it cannot be merged; leave the delta attached"
        )
