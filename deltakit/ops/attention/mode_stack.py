"""Enters and leaves prefix modes on torch's stack of function modes. Each thread has a stack of its own.

Prefix modes go below the user's modes. If Ctrl-C ends a forward, its mode stays on the stack, and the user's `with` blocks
remove whatever is on top: that must be their own modes. Below all others is torch's `DeviceContext`, which insists on it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._device import DeviceContext

from deltakit.core import running_call
from deltakit.ops.attention.function_mode import PrefixMode
from deltakit.ops.attention.kernel import AttentionPrefix


class EntersMode(AttentionPrefix):
    """Its `enter` puts a mode on the stack of this thread. The mode is checked and removed after the call.

    A class that derives from it names it ahead of its other bases.
    """

    def leave(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        mode = leave_prefix_mode(target)
        if mode is not None:
            mode.check()
        return output

    def abandon(self, target: nn.Module) -> None:
        leave_prefix_mode(target)


def enter_prefix_mode(mode: PrefixMode) -> None:
    """Puts a mode on the stack of this thread until the current call of its module is over."""
    mode.call = running_call()
    # Nearly always the stack is empty. Dynamo traces no more than this, and cannot be interrupted in between.
    if torch.compiler.is_compiling() or not _get_current_function_mode_stack():
        _push_mode(mode)
        return
    stack = _without(lambda other: other.over)
    # Of two modules in each other, the inner one's mode sees a function first.
    below = sum(isinstance(other, PrefixMode | DeviceContext) for other in stack)
    _set(stack, [*stack[:below], mode, *stack[below:]])


def leave_prefix_mode(module: nn.Module) -> PrefixMode | None:
    """Removes the mode of the current call of a module from the stack of this thread, and returns it if there was one.

    Modes that interrupted calls left there are removed, too.
    """
    call = running_call()
    found = [
        mode
        for mode in _get_current_function_mode_stack()
        if isinstance(mode, PrefixMode) and mode.module is module and (call is None or call.same_as(mode.call))
    ]
    _without(lambda other: other.over or other in found[-1:])
    return found[-1] if found else None


def _without(gone: Callable[[PrefixMode], bool]) -> list[TorchFunctionMode]:
    """Removes prefix modes from the stack of this thread, and returns what is left."""
    stack = _get_current_function_mode_stack()
    kept = [mode for mode in stack if not (isinstance(mode, PrefixMode) and gone(mode))]
    _set(stack, kept)
    return kept


def _set(stack: list[TorchFunctionMode], wanted: list[TorchFunctionMode]) -> None:
    """Changes the stack of this thread, from what it is to what is wanted."""
    same = 0
    while same < min(len(stack), len(wanted)) and stack[same] is wanted[same]:
        same += 1
    for _ in stack[same:]:
        _pop_mode()
    for mode in wanted[same:]:
        _push_mode(mode)
