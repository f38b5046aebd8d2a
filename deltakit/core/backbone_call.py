"""Holds token ids, mask and position of the backbone's current call, for delta modules deep inside the backbone.

It is a context variable, not an attribute of the backbone, so threads that share one model each see their own call.
"""

from contextvars import ContextVar
from dataclasses import dataclass, replace

from jaxtyping import Int, Shaped
from torch import Tensor

from deltakit.core.running_call import RunningCall
from deltakit.errors import StateError


@dataclass(frozen=True)
class CurrentCall:
    """The backbone's current call.

    `start`: the number of tokens already in the cache: 0 without a cache, None if it is recurrent and does not say.

    `backbone` is the id of the module that is called, `running` its call, and `outer` the call of a backbone around it.
    """

    ids: Int[Tensor, "batch seq"] | None
    mask: Shaped[Tensor, "..."] | None
    start: int | None = 0
    backbone: int = 0
    running: RunningCall | None = None
    outer: "CurrentCall | None" = None


_CALL: ContextVar[CurrentCall | None] = ContextVar("deltakit_current_call", default=None)


def current_call() -> CurrentCall:
    """Returns the ids, mask and position of the backbone's current call.

    Raises:
        StateError: outside of a call: if a part of the backbone was called alone, or if gradient checkpointing recomputes
            a block in the backward pass, after the call has returned.
    """
    call = _running(_CALL.get())
    if call is None:
        raise StateError(
            "the ids and the mask of the call are not known here: a part of the backbone was called alone, or gradient "
            "checkpointing recomputes it; call the backbone itself, and switch checkpointing off for this method"
        )
    return call


def begin_call(call: CurrentCall) -> None:
    """Makes a call the current one of this thread, inside the one that runs already."""
    _CALL.set(replace(call, outer=_running(_CALL.get(), call.backbone)))


def end_call() -> None:
    """Ends the current call of this thread. The call around it, if there is one, is current again."""
    call = _running(_CALL.get())
    _CALL.set(call.outer if call is not None else None)


def drop_interrupted_calls() -> None:
    """Forgets the calls of this thread that Ctrl-C ended, so that nobody ended them."""
    _CALL.set(_running(_CALL.get()))


def _running(call: CurrentCall | None, backbone: int | None = None) -> CurrentCall | None:
    """Returns the innermost of a call and those around it that was not interrupted.

    Args:
        backbone: the id of a backbone whose call begins now. If an earlier one cannot be told to run, it is over.
    """
    while call is not None and (call.backbone == backbone if call.running is None else call.running.over):
        call = call.outer
    return call
