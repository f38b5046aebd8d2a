"""Keeps a tensor between two hooks of one forward, such as the input of one module for the delta module at another one."""

from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import DeltaModule, hidden_input
from deltakit.errors import TargetError


class Kept:
    """A tensor that one hook of a forward keeps for a later one. Each thread has its own.

    A copy or a pickle is empty. A copy of a backbone holds one copy of it, which all that had the first share.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def put(self, x: Tensor) -> None:
        """Keeps a tensor. One that nobody dropped, because a forward was interrupted, is replaced."""
        self._held[_caller()] = x

    def look(self) -> Tensor | None:
        """Returns the tensor that was kept last; None if there is none."""
        return self._held.get(_caller())

    def drop(self) -> None:
        """Drops the tensor, if there is one."""
        self._held.pop(_caller(), None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Handover(Kept):
    """The input of the module at `source`, until the delta module at `target` takes it.

    Args:
        advice: what the error says to do if the source was not called.
    """

    def __init__(self, source: str, target: str, advice: str = "name another module with source=") -> None:
        super().__init__()
        self.source, self.target, self.advice = source, target, advice

    def take(self) -> Tensor:
        """Returns the input that was kept last, and drops it.

        Raises:
            TargetError: if there is none.
        """
        x = self.look()
        if x is None:
            raise TargetError(
                f"{self.target} was called, and {self.source}, whose input its delta reads, was not called before it; "
                f"{self.advice}"
            )
        self.drop()
        return x

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.target, self.advice)


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
