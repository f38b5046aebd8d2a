"""Holds token ids, mask and position of the backbone's current call, for delta modules deep inside the backbone.

It is a context variable, not an attribute of the backbone, so threads that share one model each see their own call.
"""

from contextvars import ContextVar
from dataclasses import dataclass

from jaxtyping import Int, Shaped
from torch import Tensor

from deltakit.errors import StateError


@dataclass(frozen=True)
class CurrentCall:
    """The backbone's current call. `start`: the number of tokens already in the cache (0 without a cache)."""

    ids: Int[Tensor, "batch seq"] | None
    mask: Shaped[Tensor, "..."] | None
    start: int = 0


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


def set_current_call(call: CurrentCall | None) -> None:
    """Makes a call the current one of this thread; None ends it."""
    _CALL.set(call)
