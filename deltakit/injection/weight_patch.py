"""Weight patches: sums in the place of parameters, for forwards that read a weight directly instead of calling its module.

A sum shadows its parameter in the instance's `__dict__`, where attribute access looks first: so the parameter stays
registered, and state dicts, optimisers and other hooks see nothing of it. Forwards nest (a module that calls itself, a layer
whose hooks stand around it and on it, two threads), and several deltas may be in one weight: so each has a count of its own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import DeltaModule
from deltakit.errors import StateError, TargetError

_TABLE = "_deltakit_sums"
_LOCK = Lock()


def _alone() -> AbstractContextManager[Any]:
    # Dynamo traces no locks, and compiles in one thread at a time.
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


def show_sum(holder: nn.Module, name: str, key: str, update: Callable[[Tensor], Tensor]) -> None:
    """Lets reads of a parameter find it with the update of the delta `key` added, until `hide_sum` was called as often."""
    with _alone():
        _enter(holder, name, key, update)


def _enter(holder: nn.Module, name: str, key: str, update: Callable[[Tensor], Tensor]) -> None:
    table: dict[str, Any] = holder.__dict__.setdefault(_TABLE, {})
    if name not in table:
        table[name] = {"was": holder.__dict__.get(name), "base": getattr(holder, name), "parts": {}}
    entry = table[name]
    update_there, depth = entry["parts"].get(key, (None, 0))
    if update_there is None or (torch.is_grad_enabled() and not update_there.requires_grad):
        # One that was made without a graph serves no forward that needs gradients.
        update_there = update(entry["base"])
        entry["parts"][key] = (update_there, depth + 1)
        _show(holder, name, entry)
    else:
        entry["parts"][key] = (update_there, depth + 1)


def hide_sum(holder: nn.Module, key: str) -> None:
    """Takes back one `show_sum` of a delta; after the last one the parameters are read themselves again."""
    with _alone():
        _leave(holder, key)


def _leave(holder: nn.Module, key: str) -> None:
    table: dict[str, Any] = holder.__dict__.get(_TABLE, {})
    for name in [name for name, entry in table.items() if key in entry["parts"]]:
        entry = table[name]
        update, depth = entry["parts"][key]
        if depth > 1:
            entry["parts"][key] = (update, depth - 1)
            continue
        del entry["parts"][key]
        _show(holder, name, entry)
        if not entry["parts"]:
            del table[name]
    if not table:
        holder.__dict__.pop(_TABLE, None)


def _show(holder: nn.Module, name: str, entry: dict[str, Any]) -> None:
    if entry["parts"]:
        total = entry["base"]
        for update, _ in entry["parts"].values():
            total = total + update.to(total.dtype)
        holder.__dict__[name] = total
    elif entry["was"] is None:
        del holder.__dict__[name]
    else:
        holder.__dict__[name] = entry["was"]


class PatchHook:
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
        for name, update in delta.scaled_updates(holder).items():
            show_sum(holder, self.name or name, self.key, partial(self._fitting, scope, update))

    def _fitting(self, scope: nn.Module, update: Tensor, weight: Tensor) -> Tensor:
        if weight.is_meta and not update.is_meta:
            raise TargetError(
                f"{self.holder or type(scope).__name__}: the weight has no values here (it is offloaded): a delta that works "
                "by the weight cannot be added to it; keep this module in memory, or leave it out with exclude="
            )
        return update.to(weight.dtype)


class UnpatchHook(PatchHook):
    """Takes the sums away again, behind the forward that reads them and also when it raises."""

    def __call__(  # type: ignore[override]
        self, scope: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        holder = scope.get_submodule(self.holder) if self.holder else scope
        hide_sum(holder, self.key)


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
