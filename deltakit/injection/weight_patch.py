"""Weight patches: they replace a parameter by its sum with updates, during forwards that read the weight directly.

The sum is put into the module's `__dict__`, where attribute access looks before `_parameters`. The parameter stays registered,
so state dicts, optimisers and other hooks do not see the sum. Forwards can be nested (a module that calls itself, hooks on a
layer and on the module around it, two threads), and several deltas may patch one weight. So the calls are noted per delta. A
call that Ctrl-C ended never takes its sum away: the next forward finds that it is over, and does.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import DeltaModule, RunningCall, module_at, running_call
from deltakit.errors import StateError, TargetError
from deltakit.injection.lock import Lock

Calls = tuple[RunningCall | None, ...]

_TABLE = "_deltakit_sums"
_BARE = "_deltakit_bare_reads"


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
    call = running_call()
    if _bare_reads(holder, key):
        raise _shared_by_threads(holder, key)
    table: dict[str, Any] = holder.__dict__.setdefault(_TABLE, {})
    if name not in table:
        # `__dict__` may hold a value of somebody else's already. It is the base of the sum, and is restored afterwards.
        table[name] = {"was": holder.__dict__.get(name), "base": getattr(holder, name), "parts": {}}
    entry = table[name]
    present, calls = entry["parts"].get(key, (None, ()))
    # An inner forward uses the outer one's update, which costs as much as the full weight. But an update that was computed
    # without a graph would give a forward with gradients none.
    if present is None or (torch.is_grad_enabled() and not present.requires_grad):
        present = update(entry["base"])
        entry["parts"][key] = (present, (*calls, call))
        _show(holder, name, entry["base"], entry["was"], entry["parts"])
    else:
        entry["parts"][key] = (present, (*calls, call))


def note_bare_read(holder: nn.Module, key: str) -> None:
    """Notes a call that reads the parameters without the update of a delta, until `hide_sum` was called.

    Raises:
        StateError: if another thread's call reads them with that update now. All threads read the same attribute.
    """
    call = running_call()
    if call is None:
        return
    with _locked():
        if any(key in entry["parts"] for entry in holder.__dict__.get(_TABLE, {}).values()):
            raise _shared_by_threads(holder, key)
        holder.__dict__.setdefault(_BARE, {})[key] = (*_bare_reads(holder, key), call)


def _bare_reads(holder: nn.Module, key: str) -> Calls:
    return tuple(call for call in holder.__dict__.get(_BARE, {}).get(key, ()) if call and not call.over)


def _forget_bare_reads(holder: nn.Module, key: str, left: Calls) -> None:
    reads: dict[str, Calls] = holder.__dict__.get(_BARE, {})
    reads.pop(key, None)
    if left:
        reads[key] = left
    elif not reads:
        holder.__dict__.pop(_BARE, None)


def _shared_by_threads(holder: nn.Module, key: str) -> StateError:
    return StateError(
        f"{key}: a weight patch on this {type(holder).__name__} is seen by all threads, and two of them call the model at the "
        "same time, one with this delta and one inside rows() without it; let them take one lock, or detach the delta"
    )


def hide_sum(holder: nn.Module, key: str) -> None:
    """Reverts one `show_sum` of a delta. After the last one, reads return the parameters themselves again."""
    call = running_call()
    with _locked():
        if _BARE in holder.__dict__:
            _forget_bare_reads(holder, key, tuple(o for o in _bare_reads(holder, key) if o and not o.same_as(call)))
        _keep(holder, lambda other, calls: _without(calls, call) if other == key else calls)


def hide_sums_of(holder: nn.Module, key: str) -> None:
    """Reverts every `show_sum` of a delta."""
    with _locked():
        _forget_bare_reads(holder, key, ())
        _keep(holder, lambda other, calls: () if other == key else calls)


def hide_interrupted(holder: nn.Module) -> None:
    """Reverts every `show_sum` of calls that were interrupted (Ctrl-C), so that no hook did it."""
    # Nearly always there is nothing. While compiling, all calls are those that are being traced.
    if _TABLE in holder.__dict__ and not torch.compiler.is_compiling():
        with _locked():
            _keep(holder, lambda _, calls: tuple(call for call in calls if call is None or not call.over))


def _without(calls: Calls, call: RunningCall | None) -> Calls:
    """Returns the calls without the last one that may be this one: of a call inside compiled code nothing is known."""
    for place in reversed(range(len(calls))):
        other = calls[place]
        if call is None or other is None or other.same_as(call):
            return (*calls[:place], *calls[place + 1 :])
    return calls


def _keep(holder: nn.Module, kept: Callable[[str, Calls], Calls]) -> None:
    """Keeps only some of the calls that patch weights of a module, and the updates of those that are left.

    The table changes after what it describes, so that an interrupted change can be made again.
    """
    # The hook after the forward always runs, even if the delta was inactive and nothing was patched.
    table: dict[str, Any] = holder.__dict__.get(_TABLE, {})
    for name in list(table):
        entry = table[name]
        parts = {}
        for key, (update, calls) in entry["parts"].items():
            left = kept(key, calls)
            if left:
                parts[key] = (update, left)
        if len(parts) < len(entry["parts"]) or not parts:
            _show(holder, name, entry["base"], entry["was"], parts)
        entry["parts"] = parts
        if not parts:
            del table[name]
    if not table:
        # Between forwards the module is as the user knows it, so copies and pickles hold nothing of deltakit's.
        holder.__dict__.pop(_TABLE, None)


def _show(holder: nn.Module, name: str, base: Tensor, was: Any, parts: dict[str, tuple[Tensor, Calls]]) -> None:
    if parts:
        # Added up from the base each time. Subtracting an update again would leave rounding errors of the sum behind.
        total = base
        for update, _ in parts.values():
            total = total + update.to(total.dtype)
        holder.__dict__[name] = total
    elif was is None:
        holder.__dict__.pop(name, None)
    else:
        holder.__dict__[name] = was


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
        self.fired = False

    def delta(self, scope: nn.Module) -> DeltaModule | None:
        """Returns the delta module of this hook, from below the module that is called; None if it is gone."""
        # Looked up by key for the same reasons as in `core.target_hooks`: copies, pickles and replicas.
        if self.source is not None:
            return self.source
        holder = self.holder_in(scope)
        found = holder._modules.get(self.key) if holder is not None else None
        return found if isinstance(found, DeltaModule) else None

    def holder_in(self, scope: nn.Module) -> nn.Module | None:
        """Returns the module whose weight is patched; None if the user removed it."""
        return module_at(scope, self.holder)

    def __call__(self, scope: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        # Another thread attaches or detaches (see `InputHook`).
        if kwargs is None:
            return
        traced = torch.compiler.is_dynamo_compiling()
        if not traced:
            self.fired = True
        holder = self.holder_in(scope)
        if holder is None:
            return
        hide_interrupted(holder)
        delta = self.delta(scope)
        if delta is None or not delta.live:
            return
        if traced and delta.record is not None:
            # As in `core.target_hooks`.
            delta.record.compiled = True
        if not delta.takes_part:
            note_bare_read(holder, self.key)
            return
        _refuse_recomputing(scope, self.holder)
        for name, update in delta.scaled_updates(holder).items():
            _refuse_computed(holder, self.name or name)
            show_sum(holder, self.name or name, self.key, partial(self._fitting, scope, update))

    def _fitting(self, scope: nn.Module, update: Tensor, weight: Tensor) -> Tensor:
        if update.shape != weight.shape and update.ndim == weight.ndim and update.shape[1:] == weight.shape[1:]:
            raise StateError(
                f"{self.holder or type(scope).__name__}: the delta was attached to a weight of shape {tuple(update.shape)}, "
                f"and it has the shape {tuple(weight.shape)} now: it was resized (resize_token_embeddings?); detach() the "
                "delta and attach a new one"
            )
        if weight.is_meta and not update.is_meta:
            raise TargetError(
                f"{self.holder or type(scope).__name__}: this weight is offloaded and has no values here, so a weight patch "
                "cannot be added to it; keep this module in memory, or leave it out with exclude="
            )
        # Updates are computed in float32 or wider, but the forward expects the weight's own dtype.
        return update.to(weight.dtype)


class UnpatchHook(PatchHook):
    """Removes the patch after the forward that reads the weights, and also when that forward raises."""

    def __call__(self, scope: nn.Module, args: tuple[Any, ...], kwargs: Any = None, output: Any = None) -> None:
        holder = self.holder_in(scope)
        if holder is not None:
            hide_sum(holder, self.key)


def _refuse_computed(holder: nn.Module, name: str) -> None:
    """Raises StateError if a weight is computed from others in each read or call, so that a patch would have no effect."""
    # By a property (`torch.nn.utils.parametrize`), or by a hook that sets it (`prune`, the old `weight_norm`).
    own = holder._parameters
    if isinstance(getattr(type(holder), name, None), property) or f"{name}_orig" in own or f"{name}_g" in own:
        raise StateError(
            f"{name} of a {type(holder).__name__} is computed from other tensors (parametrize, prune or weight_norm), so a "
            "weight patch has no effect on it; undo that, or detach the delta"
        )


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
