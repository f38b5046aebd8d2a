"""Hands the input of one module over to the delta module at another one, which is called later in the same forward."""

from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import DeltaModule, hidden_input
from deltakit.errors import TargetError


class Handover:
    """The input of the module at `source`, until the delta module at `target` takes it. Each thread has its own.

    A copy or a pickle is empty. A copy of a backbone holds one copy of it, which its two ends share.

    Args:
        advice: what the error says to do if the source was not called.
    """

    def __init__(self, source: str, target: str, advice: str = "name another module with source=") -> None:
        self.source, self.target, self.advice = source, target, advice
        self._held: dict[int, Tensor] = {}

    def put(self, x: Tensor) -> None:
        """Keeps an input. One that nobody took, because a forward was interrupted, is dropped."""
        self._held[_caller()] = x

    def take(self) -> Tensor:
        """Returns the input that was kept last, and drops it.

        Raises:
            TargetError: if there is none.
        """
        x = self._held.pop(_caller(), None)
        if x is None:
            raise TargetError(
                f"{self.target} was called, and {self.source}, whose input its delta reads, was not called before it; "
                f"{self.advice}"
            )
        return x

    def __reduce__(self) -> tuple[Any, ...]:
        return Handover, (self.source, self.target, self.advice)


class InputTap(DeltaModule):
    """Hands the input of its target over. It has no parameters and changes nothing."""

    def __init__(self, handovers: tuple[Handover, ...]) -> None:
        super().__init__()
        self.handovers = handovers

    def before_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.takes_part:
            return
        x = hidden_input(args, kwargs)
        for handover in self.handovers:
            handover.put(x)

    def summary(self) -> str:
        return f"input for {', '.join(handover.target for handover in self.handovers)}"


def _caller() -> int:
    # Dynamo cannot trace the number of the thread. Between the two ends of a compiled forward no other one runs.
    return 0 if torch.compiler.is_compiling() else get_ident()
