"""Holds token ids, mask and position of the backbone's current call, for delta modules deep inside the backbone.

It is a context variable, not an attribute of the backbone, so threads that share one model each see their own call. What
gradient checkpointing computes again in the backward pass has the call of its forward (`graph_notes`).
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from deltakit.core.graph_notes import CALL, in_backward, mark_inputs, note, noted
from deltakit.core.running_call import RunningCall
from deltakit.errors import StateError

_RECOMPUTED = "recomputed"
INSERTED = "inserted"
"""A key of `CurrentCall.kept`."""
# torch has no public function that tells whether saved tensors go through hooks, as under checkpointing. Where it is missing,
# they always may.
_saved_tensors_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True
)


@dataclass(frozen=True)
class CurrentCall:
    """The backbone's current call.

    `start`: the number of tokens already in the cache: 0 without a cache, None if it is recurrent and does not say.

    `backbone` is the id of the module that is called, `running` its call, and `outer` the call of a backbone around it.
    `cache` is the cache that it was given, and `kept` has what is computed once in a call for all delta modules.
    """

    ids: Int[Tensor, "*batch seq"] | None
    mask: Shaped[Tensor, "..."] | None
    start: int | None = 0
    backbone: int = 0
    running: RunningCall | None = None
    outer: "CurrentCall | None" = None
    cache: Any = None
    kept: dict[Any, Any] = field(default_factory=dict)


_CALL: ContextVar[CurrentCall | None] = ContextVar("deltakit_current_call", default=None)


def current_call() -> CurrentCall:
    """Returns the ids, mask and position of the backbone's current call.

    Under gradient checkpointing it is also known in the backward pass.

    Raises:
        StateError: outside of a call: if a part of the backbone was called alone.
    """
    call = _running(_CALL.get())
    if call is not None:
        if not call.kept.get(_RECOMPUTED) and _may_be_recomputed():
            call.kept[_RECOMPUTED] = True
        return call
    found: CurrentCall | None = noted(CALL) if in_backward() else None
    if found is None:
        raise StateError(
            "the ids and the mask of the call are not known here, because a part of the backbone was called alone; call the "
            "backbone itself"
        )
    return found


def note_inserted(layout: Any) -> None:
    """Notes in the current call, if one is known, where a soft prompt was inserted into its texts."""
    # Dynamo cannot trace context variables. Whoever needs the layout says that it is not known.
    if torch.compiler.is_compiling():
        return
    call = _running(_CALL.get())
    if call is not None:
        call.kept[INSERTED] = layout


def begin_call(call: CurrentCall, backbone: nn.Module | None = None, inputs: Any = ()) -> None:
    """Makes a call the current one of this thread, inside the one that runs already.

    Args:
        backbone: the module that is called.
        inputs: its arguments, in any containers.
    """
    if backbone is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        mark_inputs(inputs, backbone)
    _CALL.set(replace(call, outer=_running(_CALL.get(), call.backbone)))


def end_call(backbone: nn.Module | None = None, output: Any = None) -> CurrentCall | None:
    """Ends the current call of this thread, and returns it. The call around it, if there is one, is current again.

    Args:
        backbone: the module that was called.
        output: what it returned; None if it raised.
    """
    call = _running(_CALL.get())
    _CALL.set(call.outer if call is not None else None)
    if call is None or backbone is None or output is None or not call.kept.get(_RECOMPUTED):
        return call
    if torch.is_grad_enabled() and not in_backward():
        note(output, backbone, CALL, replace(call, running=None, outer=None, cache=None))
    return call


def drop_interrupted_calls() -> None:
    """Forgets the calls of this thread that Ctrl-C ended, so that nobody ended them."""
    _CALL.set(_running(_CALL.get()))


def _may_be_recomputed() -> bool:
    """Returns whether this part of a forward may run under gradient checkpointing.

    If reentrant, it runs without gradients inside a forward that has them. Else the tensors that it saves go through hooks.
    """
    return not torch.compiler.is_compiling() and (not torch.is_grad_enabled() or bool(_saved_tensors_hooks(True)))


def _running(call: CurrentCall | None, backbone: int | None = None) -> CurrentCall | None:
    """Returns the innermost of a call and those around it that was not interrupted.

    Args:
        backbone: the id of a backbone whose call begins now. If an earlier one cannot be told to run, it is over.
    """
    while call is not None and (call.backbone == backbone if call.running is None else call.running.over):
        call = call.outer
    return call
