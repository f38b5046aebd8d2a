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


class Ahead:
    """Calls the delta modules of a target ahead of it, one after the other: one hook, however many there are."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.delta_keys = keys
        self.handle: Any = None

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = False
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is None or not delta.live or not delta.takes_part:
                continue
            new = delta.before(target, args, kwargs)
            if new is not None:
                (args, kwargs), changed = new, True
        return (args, kwargs) if changed else None


class Behind(Ahead):
    """Calls the delta modules of a target behind it, each with what the one before it made of the output."""

    def __init__(self, keys: tuple[str, ...], *, always: bool) -> None:
        super().__init__(keys)
        self.always = always
        self.fired = False

    def __call__(  # type: ignore[override]
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self.fired = True
        try:
            return self._through(target, args, kwargs, output)
        except BaseException:
            # Torch has called this hook: what must always be called would be left out.
            if self.always and output is not None:
                self._through(target, args, kwargs, None)
            raise

    def _through(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # In every call of every target: nothing is asked twice here.
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is None:
                continue
            # Behind a forward that raised, torch calls with no output what is always called.
            if output is None and self.always and not delta.always_after:
                continue
            record = delta.record
            if record is not None and (not record.active or record.merged):
                continue
            if record is None or record.batch is None:
                new = delta.after(target, args, kwargs, output)
            else:
                first = record.batch.first.get(target)
                if first is not None and first is not delta:
                    continue
                new = delta.after_rows(target, args, kwargs, output, record.batch)
            if new is not None:
                output = new
        return output


class Replace:
    """Puts weights with their update added in the place of weights, ahead of the forward that reads them.

    `holder` is the path from the hooked module to that of the delta. `source`: the delta module, where it does not stand on
    the holder itself: its weight is tied to the holder's, which calls it `name`.
    """

    def __init__(self, key: str, holder: str = "", source: DeltaModule | None = None, name: str = "") -> None:
        self.key = key
        self.holder = holder
        self.source = source
        self.name = name
        self.handle: Any = None
        self.fired = False

    def delta(self, scope: nn.Module) -> DeltaModule | None:
        """The delta module of this hook, below the module that is called."""
        if self.source is not None:
            return self.source
        found = (scope.get_submodule(self.holder) if self.holder else scope)._modules.get(self.key)
        return found if isinstance(found, DeltaModule) else None

    def __call__(self, scope: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.fired = True
        delta = self.delta(scope)
        if delta is None or not delta.live or not delta.takes_part:
            return
        holder = scope.get_submodule(self.holder) if self.holder else scope
        _refuse_recomputing(scope, self.holder)
        for name, update in delta.scaled_update(holder).items():
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
