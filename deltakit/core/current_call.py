"""What the backbone's call is about, for delta modules deep inside it: token ids, mask, and the position of this step.

A context variable and not an attribute of the backbone: threads that share one model each see their own call.
"""

from contextvars import ContextVar
from dataclasses import dataclass, replace

from jaxtyping import Int, Shaped
from torch import Tensor

from deltakit.errors import StateError


@dataclass(frozen=True)
class CurrentCall:
    """The backbone's call that runs now. `start`: how many tokens a filled cache holds already (0 without one).

    `backbone` is the identity of what is called, and `outer` the call of a backbone around it.
    """

    ids: Int[Tensor, "batch seq"] | None
    mask: Shaped[Tensor, "..."] | None
    start: int = 0
    backbone: int = 0
    outer: "CurrentCall | None" = None


_CALL: ContextVar[CurrentCall | None] = ContextVar("deltakit_current_call", default=None)


def current_call() -> CurrentCall:
    """The ids, mask and position of the backbone's call that runs now.

    Raises:
        StateError: outside such a call: a part of the backbone was called alone, or gradient checkpointing computes a block
            again in the backward pass, when the call is over.
    """
    call = _CALL.get()
    if call is None:
        raise StateError(
            "the ids and the mask of the call are not known here: a part of the backbone was called alone, or gradient "
            "checkpointing computes it again; call the backbone itself, and switch checkpointing off for this method"
        )
    return call


def begin_call(call: CurrentCall) -> None:
    """Makes a call the current one of this thread, inside the one that runs already."""
    outer = _CALL.get()
    left = outer
    # What an interruption left of an earlier call of the same backbone is over, and so is all that ran inside it.
    while left is not None:
        outer, left = (left.outer if left.backbone == call.backbone else outer), left.outer
    _CALL.set(replace(call, outer=outer))


def end_call() -> None:
    """Makes the call around the current one of this thread the current one again, if there is one."""
    call = _CALL.get()
    _CALL.set(call.outer if call is not None else None)
