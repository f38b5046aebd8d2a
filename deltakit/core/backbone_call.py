"""Holds token ids, mask and position of the backbone's current call, for delta modules deep inside the backbone.

It is a context variable, not an attribute of the backbone, so threads that share one model each see their own call.
"""

from contextvars import ContextVar
from dataclasses import dataclass, replace

from jaxtyping import Int, Shaped
from torch import Tensor

from deltakit.errors import StateError


@dataclass(frozen=True)
class CurrentCall:
    """The backbone's current call. `start`: the number of tokens already in the cache (0 without a cache).

    `backbone` is the id of the module that is called, and `outer` the call of a backbone around it.
    """

    ids: Int[Tensor, "batch seq"] | None
    mask: Shaped[Tensor, "..."] | None
    start: int = 0
    backbone: int = 0
    outer: "CurrentCall | None" = None


_CALL: ContextVar[CurrentCall | None] = ContextVar("deltakit_current_call", default=None)


def current_call() -> CurrentCall:
    """Returns the ids, mask and position of the backbone's current call.

    Raises:
        StateError: outside of a call: if a part of the backbone was called alone, or if gradient checkpointing recomputes
            a block in the backward pass, after the call has returned.
    """
    call = _CALL.get()
    if call is None:
        raise StateError(
            "the ids and the mask of the call are not known here: a part of the backbone was called alone, or gradient "
            "checkpointing recomputes it; call the backbone itself, and switch checkpointing off for this method"
        )
    return call


def begin_call(call: CurrentCall) -> None:
    """Makes a call the current one of this thread, inside the one that runs already."""
    outer = _CALL.get()
    left = outer
    # An interruption (Ctrl-C) skips `end_call`. So an earlier call of the same backbone is over, with all calls inside it.
    while left is not None:
        outer, left = (left.outer if left.backbone == call.backbone else outer), left.outer
    _CALL.set(replace(call, outer=outer))


def end_call() -> None:
    """Ends the current call of this thread. The call around it, if there is one, is current again."""
    call = _CALL.get()
    _CALL.set(call.outer if call is not None else None)
