"""What is called when a hook fires: a delta module ahead of its target, behind it, or put into a weight.

A hook looks its delta module up from the module that is called, by path and key: so it stays right in a deepcopy, in a
pickle and in the replicas of `nn.DataParallel`, which share one table of hooks.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.errors import StateError, TargetError
from deltakit.method import DeltaModule
from deltakit.shadows import enter, leave


class Before:
    """Calls a delta module ahead of its target. `holder` is the path from the hooked module to that of the delta."""

    fired: bool = False

    def __init__(self, key: str, holder: str = "") -> None:
        self.key = key
        self.holder = holder
        self.handle: Any = None

    def delta(self, module: nn.Module) -> DeltaModule | None:
        """The delta module of this hook, below the module that is called."""
        found = (module.get_submodule(self.holder) if self.holder else module)._modules.get(self.key)
        return found if isinstance(found, DeltaModule) else None

    def note(self) -> None:
        """Notes that the hook was called at all."""
        # Asked in this order: what is compiled must not depend on whether it was called before.
        if not torch.compiler.is_compiling() and not self.fired:
            self.fired = True

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        delta = self.delta(target)
        if delta is None or not delta.live or not delta.takes_part:
            return None
        return delta.before(target, args, kwargs)


class After(Before):
    """Calls a delta module behind its target."""

    def __call__(  # type: ignore[override]
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        # In every call of every target: nothing is asked twice here.
        self.note()
        delta: Any = target._modules.get(self.key)
        if delta is None:
            return None
        record = delta.record
        if record is not None and (not record.active or record.merged):
            return None
        if record is not None and record.batch is not None:
            first = record.batch.first.get(target)
            if first is not None and first is not delta:
                return None
            return delta.after_rows(target, args, kwargs, output, record.batch)
        return delta.after(target, args, kwargs, output)


class Replace(Before):
    """Puts weights with their update added in the place of weights, ahead of the forward that reads them.

    `source`: the delta module, where it does not stand on the holder itself: its weight is tied to the holder's, which calls
    it `name`.
    """

    def __init__(self, key: str, holder: str = "", source: DeltaModule | None = None, name: str = "") -> None:
        super().__init__(key, holder)
        self.source = source
        self.name = name

    def delta(self, module: nn.Module) -> DeltaModule | None:
        return self.source or super().delta(module)

    def __call__(self, scope: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.note()
        delta = self.delta(scope)
        if delta is None or not delta.live:
            return
        holder = scope.get_submodule(self.holder) if self.holder else scope
        _refuse_recomputing(scope, self.holder)
        for name, update in delta.weight_update(holder).items():
            enter(holder, self.name or name, self.key, partial(self._fitting, scope, update))

    def _fitting(self, scope: nn.Module, update: Tensor, weight: Tensor) -> Tensor:
        if weight.is_meta and not update.is_meta:
            raise TargetError(
                f"{self.holder or type(scope).__name__}: the weight has no values here (it is offloaded): a delta that works "
                "by the weight cannot be added to it; keep this module in memory, or leave it out with exclude="
            )
        return update.to(weight.dtype)


class Restore(Replace):
    """Takes the sums away again, behind the forward that reads them and also when it raises."""

    def __call__(  # type: ignore[override]
        self, scope: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        holder = scope.get_submodule(self.holder) if self.holder else scope
        leave(holder, self.key)


def _refuse_recomputing(scope: nn.Module, holder: str) -> None:
    """A block that is computed again in the backward pass would read the bare weight then."""
    if not (scope.training and torch.is_grad_enabled()):
        return
    module: Tensor | nn.Module = scope
    for name in holder.split("."):
        module = getattr(module, name) if name else module
        recomputed = any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)
        if module is not scope and recomputed and getattr(module, "gradient_checkpointing", False):
            raise StateError(
                f"{holder}: its block is computed again in the backward pass (gradient checkpointing), after the module "
                "that reads this weight has returned; switch checkpointing off, or leave the weight out with exclude="
            )
