"""Prefixes behind a gate: keys g P_k and values g P_v, with one g in (0, 1) for each example (UniPELT)."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import Target, hidden_input
from deltakit.errors import StateError
from deltakit.ops.attention.kernel import AttentionPrefix
from deltakit.ops.attention.sites import input_width
from deltakit.ops.example_gates import gate_of, new_gate
from deltakit.ops.handover import Kept


class GatedPrefix(AttentionPrefix):
    """A prefix that may have a gate, which reads the input of the attention module. The author calls `add_gate` for that.

    The keys and values are asked for inside of the attention, where that input is not known. So the gates are computed ahead
    of each call of the module, and kept until it ends. A class that derives from this one names it ahead of its other bases.
    """

    def add_gate(self, target: Target) -> None:
        """Adds the gate [1, d].

        Raises:
            TargetError: if the structure does not show the number of features that enter the attention.
        """
        self.gate = new_gate(input_width(target), target)
        self.gates = Kept()

    @property
    def has_gate(self) -> bool:
        """Whether it has a gate."""
        return "gate" in self._modules

    def key_value(
        self,
    ) -> tuple[Float[Tensor, "*examples heads prefix d_k"], Float[Tensor, "*examples heads prefix d_v"]]:
        key, value = super().key_value()
        if not self.has_gate:
            return key, value
        gates = self.gates.look()
        if gates is None:
            raise StateError(
                "the attention around a prefix with a gate ran without its hooks, so the gate is not known; call the module "
                "itself instead of its forward()"
            )
        return key * gates, value * gates

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for prefix in self._gated(target):
            x = hidden_input(args, kwargs)
            if isinstance(target, nn.MultiheadAttention) and not target.batch_first and x.ndim == 3:
                x = x.transpose(0, 1)
            # Without a batch all positions are those of one example.
            gates = gate_of(prefix.gate, (x if x.ndim > 2 else x[None]).to(prefix.gate.weight.dtype))
            prefix.gates.put(gates.view(-1, 1, 1, 1))
        return super().enter(target, args, kwargs)

    def leave(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._drop(target)
        return super().leave(target, args, kwargs, output)

    def abandon(self, target: nn.Module) -> None:
        self._drop(target)
        super().abandon(target)

    def _gated(self, target: nn.Module) -> list[Any]:
        return [prefix for prefix in self.peers(target) if prefix.has_gate]

    def _drop(self, target: nn.Module) -> None:
        for prefix in self._gated(target):
            prefix.gates.drop()

    def saved_state(self) -> dict[str, Tensor]:
        gate = self.gate.named_parameters() if self.has_gate else ()
        return {**super().saved_state(), **{f"gate.{name}": value.detach() for name, value in gate}}

    def summary(self) -> str:
        return super().summary() + (" gate" if self.has_gate else "")
