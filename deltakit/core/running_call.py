"""Tells whether a module's call is still running.

torch calls hooks with `always_call` for an `Exception` only. Ctrl-C (`KeyboardInterrupt`) and `SystemExit` skip them, so what
a hook did ahead of a call may never be undone by the hook behind it. Whatever is changed for the time of a call therefore
notes the call, and whoever meets it later asks whether that call is over.
"""

import sys
from types import FrameType
from typing import Any

import torch
from torch.nn.modules import module as torch_module

_GLOBALS = vars(torch_module)


class RunningCall:
    """The call of a module, recognised by the frame in which torch runs its hooks and its forward.

    A frame is one call only, so this tells apart calls of the same module in each other and in other threads. A copy or a
    pickle is of a call that is over.
    """

    __slots__ = ("_frame",)

    def __init__(self, frame: FrameType | None = None) -> None:
        self._frame = frame

    @property
    def over(self) -> bool:
        """Whether the call has returned or was left by an exception."""
        mine = self._frame
        if mine is None:
            return True
        # Nearly always it is this thread's and a few frames above: 50 ns for each of them.
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is mine:
                return False
            frame = frame.f_back
        try:
            # Python refuses to clear a frame that is executing, in whichever thread.
            mine.clear()
        except RuntimeError:
            return False
        self._frame = None
        return True

    def same_as(self, other: "RunningCall | None") -> bool:
        """Returns whether the two are one call."""
        return other is not None and self._frame is other._frame

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningCall, ()


def running_call() -> RunningCall | None:
    """Returns the call of the module whose hook is running now; None while compiling, and outside of torch's hooks."""
    # Dynamo cannot trace frames.
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals is not _GLOBALS:
        frame = frame.f_back
    if frame is None:
        return None
    # torch calls hooks in `inner`, and those that clean up after an exception in `_call_impl` around it.
    outer = frame.f_back
    return RunningCall(outer if frame.f_code.co_name == "inner" and outer is not None else frame)
