"""Weight patches: they replace a parameter by its sum with updates, during forwards that read the weight directly.

The sum is put into the module's `__dict__`, where attribute access looks before `_parameters`. The parameter stays registered,
so state dicts, optimisers and other hooks do not see the sum. Forwards can be nested (a module that calls itself, hooks on a
layer and on the module around it, two threads), and several deltas may patch one weight. So calls are counted per delta.
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


def _locked() -> AbstractContextManager[Any]:
    # Threads that share one model read and write the same table. Dynamo cannot trace a lock, and compiles in one thread.
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


def show_sum(holder: nn.Module, name: str, key: str, update: Callable[[Tensor], Tensor]) -> None:
    """Makes reads of a parameter return it with an update added, until `hide_sum` was called as often.

    Args:
        holder: the module that holds the parameter `name`.
        key: the name of the delta module.
        update: returns the update for the parameter's current value.
    """
    with _locked():
        _enter(holder, name, key, update)


def _enter(holder: nn.Module, name: str, key: str, update: Callable[[Tensor], Tensor]) -> None:
    table: dict[str, Any] = holder.__dict__.setdefault(_TABLE, {})
    if name not in table:
        # `__dict__` may hold a value of somebody else's already. It is the base of the sum, and is restored afterwards.
        table[name] = {"was": holder.__dict__.get(name), "base": getattr(holder, name), "parts": {}}
    entry = table[name]
    present, depth = entry["parts"].get(key, (None, 0))
    # An inner forward uses the outer one's update, which costs as much as the full weight. But an update that was computed
    # without a graph would give a forward with gradients none.
    if present is None or (torch.is_grad_enabled() and not present.requires_grad):
        present = update(entry["base"])
        entry["parts"][key] = (present, depth + 1)
        _show(holder, name, entry)
    else:
        entry["parts"][key] = (present, depth + 1)


def hide_sum(holder: nn.Module, key: str) -> None:
    """Reverts one `show_sum` of a delta. After the last one, reads return the parameters themselves again."""
    with _locked():
        _leave(holder, key)


def _leave(holder: nn.Module, key: str) -> None:
    # The hook after the forward always runs, even if the delta was inactive and nothing was patched.
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
        # Between forwards the module is as the user knows it, so copies and pickles hold nothing of deltakit's.
        holder.__dict__.pop(_TABLE, None)


def _show(holder: nn.Module, name: str, entry: dict[str, Any]) -> None:
    if entry["parts"]:
        # Added up from the base each time. Subtracting an update again would leave rounding errors of the sum behind.
        total = entry["base"]
        for update, _ in entry["parts"].values():
            total = total + update.to(total.dtype)
        holder.__dict__[name] = total
    elif entry["was"] is None:
        del holder.__dict__[name]
    else:
        holder.__dict__[name] = entry["was"]


class PatchHook:
    """Patches the weights of a delta module before the forward that reads them.

    Args:
        key: the name of the delta module in the module that holds it.
        holder: the path from the hooked module to the module whose weight is patched.
        source: the delta module, if another module holds it: their weights are tied.
        name: then the name of the weight in the holder.
    """

    def __init__(self, key: str, holder: str = "", source: DeltaModule | None = None, name: str = "") -> None:
        self.key = key
        self.holder = holder
        self.source = source
        self.name = name
        self.handle: Any = None
        self.fired = False

    def delta(self, scope: nn.Module) -> DeltaModule | None:
        """Returns the delta module of this hook, from below the module that is called; None if it is gone."""
        # Looked up by key for the same reasons as in `output_hooks`: copies, pickles and replicas.
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
                f"{self.holder or type(scope).__name__}: this weight is offloaded and has no values here, so a weight patch "
                "cannot be added to it; keep this module in memory, or leave it out with exclude="
            )
        # Updates are computed in float32 or wider, but the forward expects the weight's own dtype.
        return update.to(weight.dtype)


class UnpatchHook(PatchHook):
    """Removes the patch after the forward that reads the weights, and also when that forward raises."""

    def __call__(  # type: ignore[override]
        self, scope: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        holder = scope.get_submodule(self.holder) if self.holder else scope
        hide_sum(holder, self.key)


def _refuse_recomputing(scope: nn.Module, holder: str) -> None:
    """Raises StateError if gradient checkpointing would recompute a block below the scope that reads the patched weight."""
    # The recomputation runs in the backward pass, after the scope has returned and its patch is removed. The block would
    # read the bare weight, and the gradients would be silently wrong.
    if not (scope.training and torch.is_grad_enabled()):
        return
    module: Tensor | nn.Module = scope
    for name in holder.split("."):
        module = getattr(module, name) if name else module
        recomputed = any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)
        if module is not scope and recomputed and getattr(module, "gradient_checkpointing", False):
            raise StateError(
                f"{holder}: gradient checkpointing recomputes its block in the backward pass, after the weight patch is "
                "removed; switch checkpointing off, or leave this weight out with exclude="
            )
