"""Bottlenecks: up(f(down(x))), the change that all kinds of adapters add to an output.

He et al. 2022 (https://arxiv.org/abs/2110.04366, section 3) show adapters as one design with several choices. Here `down` and
`up` are linear layers of any kind, and a method chooses their input, their start values, and what their result is added to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import Design, Method, Target, hidden_input, hidden_output, replace_hidden
from deltakit.errors import OptionError, TargetError
from deltakit.ops.example_gates import gate_of, new_gate
from deltakit.ops.kinds.maps import in_own_dtype
from deltakit.ops.kinds.output_map import OutputMap

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class BottleneckMethod(Method):
    """The options that methods with a bottleneck share. Each of them describes them in its own docstring."""

    size: int | None = None
    reduction: int | None = None
    activation: str = "gelu"
    gate: bool = False

    usual_size: ClassVar[int] = 64
    """The size of the bottleneck where neither option is given."""
    usual_reduction: ClassVar[int | None] = None
    """The reduction where neither option is given; None for `usual_size`."""

    def validate(self) -> None:
        word = type(self).__name__
        if self.size is not None and self.reduction is not None:
            raise OptionError(f"{word}(size={self.size}, reduction={self.reduction}): omit one of the two")
        for option in ("size", "reduction"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"{word}({option}={value}): expected at least 1, or None")
        if self.activation not in ACTIVATIONS:
            raise OptionError(f"{word}(activation={self.activation!r}): expected one of {', '.join(ACTIVATIONS)}")

    def bottleneck(self, d: int) -> int:
        """Returns the size of the bottleneck for an input of d features, in elements."""
        reduction = self.reduction or self.usual_reduction
        if self.size is None and reduction is not None:
            return max(1, d // reduction)
        return self.size or self.usual_size


class Bottleneck(OutputMap):
    """An output map with the linear layers `down` and `up` and an activation between them.

    The author sets both layers, so that `up` returns zero at the start, and writes `forward` with `change`. With
    `add_to="input"` the target is a norm: `forward` gets its output and its input, in this order, and changes the input.
    """

    design: ClassVar[Design] = Design(form="f(y W_d + b_d) W_u + b_u", composition="addition").over(OutputMap.design)

    down: nn.Module
    up: nn.Module

    def __init__(
        self, target: Target, options: BottleneckMethod, add_to: Literal["output", "input"] = "output"
    ) -> None:
        super().__init__(target)
        self.activation = options.activation
        self.add_to = add_to
        weight = getattr(target.module, "weight", None)
        is_norm = isinstance(weight, Tensor) and weight.ndim == 1 and self.axis == -1
        if add_to == "input" and not (is_norm and target.feature_slice is None):
            raise TargetError(
                f"{target.named}: {type(options).__name__}(add_to='input') works on norms of the last dimension, found a "
                f"{type(target.module).__name__}; select norms, such as at='@norm', or omit add_to="
            )

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.add_to == "output":
            return super().after_call(target, args, kwargs, output)
        # The norm reads its input with the change added. What other deltas did to its output stays: only the difference that
        # this change makes is added to it.
        x, y = hidden_input(args, kwargs), hidden_output(output)
        new = y + (target.forward(in_own_dtype(self, y, x)) - target.forward(x))
        return replace_hidden(output, new if self.strength == 1 else torch.lerp(y, new, self.strength))

    def contribution(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        if self.add_to == "output":
            return super().contribution(target, args, kwargs, y)
        x = hidden_input(args, kwargs)
        return (in_own_dtype(self, y, x) - x) * self.strength

    def change(self, x: Float[Tensor, "*batch d_in"], *given: Any) -> Float[Tensor, "*batch d"]:
        """Returns up(f(down(x))).

        Args:
            given: what both layers get beside their input.
        """
        changed: Tensor = self.up(ACTIVATIONS[self.activation](self.down(x, *given)), *given)
        gate = self._modules.get("gate")
        return changed if gate is None else changed * gate_of(gate, x)

    @property
    def words(self) -> str:
        """The activation, and whether there is a gate, for `summary`."""
        return f"{self.activation} gate" if "gate" in self._modules else self.activation

    def add_gate(self, d_in: int, target: Target) -> None:
        """Adds the gate [1, d_in] that multiplies the result: the mean over the positions of sigmoid(x W_g + b_g)."""
        self.gate = new_gate(d_in, target)
