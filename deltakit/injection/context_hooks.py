"""The hooks on targets whose delta modules must clean up after each call (`abandon`), also after one that was interrupted.

torch calls a hook with `always_call` after an `Exception`, but not after Ctrl-C. So the calls are noted, and one that is over
without its output hook is cleaned up ahead of the next call, or when a delta is attached to the target or detached.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from deltakit.core import InputHook, OutputHook, RunningCall, running_call
from deltakit.injection.tables import ours


class ContextInputHook(InputHook):
    """An input hook that notes the calls of its target. `calls` is the same list as that of its `ContextOutputHook`."""

    def __init__(self, keys: tuple[str, ...], calls: list[RunningCall]) -> None:
        super().__init__(keys)
        self.calls = calls

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        clean_up(target, self.calls)
        call = running_call()
        if call is not None:
            self.calls.append(call)
        return super().__call__(target, args, kwargs)


class ContextOutputHook(OutputHook):
    """An output hook that also calls `abandon` of its delta modules after a call that raised."""

    def __init__(self, keys: tuple[str, ...], calls: list[RunningCall]) -> None:
        super().__init__(keys)
        self.calls = calls

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
        try:
            # After a forward that raised, torch passes None as the output. And it passes none while another thread attaches
            # or detaches (see `InputHook`).
            if output is None:
                self.fired = True
                _abandon(target)
            else:
                output = super().__call__(target, args, kwargs, output)
        except BaseException:
            # torch has called this hook already and does not call it again for this exception.
            _abandon(target)
            self._end()
            raise
        self._end()
        return output

    def _end(self) -> None:
        call = running_call()
        for mine in [other for other in self.calls if other.same_as(call)]:
            _drop(self.calls, mine)


def clean_up(target: nn.Module, calls: list[RunningCall]) -> None:
    """Calls `abandon` of a target's delta modules for each of its calls that is over and was not cleaned up."""
    # Usually the list is empty: it is not in nested calls, in other threads' calls and after an interruption.
    if not calls or torch.compiler.is_compiling():
        return
    for call in [call for call in calls if call.over]:
        _abandon(target)
        _drop(calls, call)


def _drop(calls: list[RunningCall], call: RunningCall) -> None:
    """Removes a call from the list that both hooks and all threads share."""
    # One at a time: threads add to the list meanwhile. Another thread may have found the same call, and removed it.
    with suppress(ValueError):
        calls.remove(call)


def _abandon(target: nn.Module) -> None:
    for hook in ours(target, ContextOutputHook):
        for key in hook.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is not None:
                delta.abandon(target)
