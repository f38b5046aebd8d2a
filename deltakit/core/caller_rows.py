"""The rows of the caller: which mixed batch applies to a call.

A `rows` block belongs to the thread or the asyncio task that entered it, not to the backbone: threads can serve different
batches on one model, and a forward elsewhere does not see them. A context variable holds the mixed batches of all blocks
that a caller is in, by the record of each delta. What runs in the backward pass has the rows of its forward (`graph_notes`).
"""

import asyncio
import inspect
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from deltakit.core.graph_notes import ROWS, in_backward, mark_inputs, note, noted
from deltakit.core.mixed_batch import MixedBatch
from deltakit.errors import OptionError, StateError, no_such_delta


@runtime_checkable
class RowsState(Protocol):
    """The part of a delta's record that says where its rows are in use."""

    has_rows: bool
    rows_in_use: set[int]
    open_blocks: set[int]
    unrooted: bool


class CallerRows(dict[RowsState, MixedBatch]):
    """The mixed batches of all blocks that a caller is in, by record. It is never changed, because graphs may hold it."""


_NO_ROWS = CallerRows()
_ROWS: ContextVar[CallerRows] = ContextVar("deltakit_rows", default=_NO_ROWS)
# Reentrant, because the garbage collector may call `_forget` while the lock is held.
_LOCK = threading.RLock()


class _Compiling(threading.local):
    """The same rows for code that is being compiled: dynamo cannot trace a context variable, and this it can.

    They are pairs and not a mapping, because dynamo cannot trace mappings by objects.
    """

    rows: tuple[tuple[RowsState, MixedBatch], ...] = ()


_COMPILING = _Compiling()


def rows_now(record: RowsState, module: nn.Module) -> MixedBatch | None:
    """Returns the mixed batch that applies to a delta in this call; None if the call has no rows.

    It takes 0.4 us, so it is only asked while `record.has_rows` is set.

    Args:
        module: a delta module of this delta.

    Raises:
        StateError: if the block was left by the caller that this task was started by; in a replica of `nn.DataParallel`; and
            in a backward pass if it is unknown which rows its forward had.
    """
    if torch.compiler.is_compiling():
        for known, batch in _COMPILING.rows:
            if known is record and batch.open:
                return batch
        # A block may have been entered by another caller of this thread, or the backward pass may be running.
        torch._dynamo.graph_break()
    here = _ROWS.get().get(record)
    if in_backward():
        rows: Mapping[RowsState, MixedBatch] | None = noted(ROWS)
        return rows.get(record) if rows is not None else _unnoted(record, here)
    if here is None:
        if record.open_blocks and module.__dict__.get("_is_replica"):
            raise StateError(
                "rows: nn.DataParallel runs its replicas in threads of their own, which do not see the rows() block; call the "
                "model without nn.DataParallel, or use DistributedDataParallel"
            )
        return None
    if not here.open:
        raise StateError(
            "rows: the rows() block in which this task or thread was started has ended; start it outside of the block, or "
            "enter a block of its own"
        )
    if threading.get_ident() not in here.running and _makes_graph():
        # A part of the backbone was called alone, so nobody notes these rows on the graph.
        _set_unrooted(here)
    return here


def _unnoted(record: RowsState, batch: MixedBatch | None) -> MixedBatch | None:
    """Returns the rows for a graph without a note, given those of the caller of `backward`."""
    if record.unrooted:
        if batch is not None and batch.open:
            return batch
        raise StateError(
            "rows: the backward pass runs a part of the backbone again (gradient checkpointing), and its rows are unknown, "
            "because parts of the backbone were called alone inside a rows() block; call the whole backbone, or call "
            "backward() inside the block"
        )
    if batch is None:
        # All forwards with rows have left notes, so this one had none.
        return None
    raise StateError(
        "rows: the backward pass runs a part of the backbone again (gradient checkpointing), and its forward did not run "
        "inside a rows() block; call its backward() outside of the block"
    )


def open_rows(
    records: Sequence[Any],
    names: Sequence[str | None],
    *,
    suspends: bool = True,
    device: torch.device | str = "cpu",
) -> MixedBatch:
    """Sets the mixed batch of these records for the calling thread or task, until `close_rows`.

    Args:
        records: the records of all deltas on one backbone.
        names: for each example the name of its delta, or None.
        suspends: whether other callers may run in this thread before `close_rows`: tasks of an event loop, or whoever drives a
            generator.
        device: where compiled code reads whose examples they are.

    Raises:
        OptionError: if a name is unknown, or no name is given.
        StateError: if the caller is in another `rows` block of the backbone, or a named delta is not active or is merged.
    """
    _check_names(records, names)
    present = {record: batch for record, batch in _ROWS.get().items() if batch.open}
    if any(record in present for record in records):
        raise StateError("rows: this backbone is in another rows() block already; leave that block first")
    batch = _mixed_batch(records, names, device)
    try:
        for record in records:
            record.open_blocks.add(id(batch))
        rows = _tracked({**present, **dict.fromkeys(records, batch)})
        _ROWS.set(rows)
        if not (suspends and _can_be_suspended()):
            _COMPILING.rows = tuple(rows.items())
    except BaseException:
        # An interruption (Ctrl-C) here would skip the end of the `with` block.
        close_rows(records, batch)
        raise
    return batch


def _mixed_batch(records: Sequence[Any], names: Sequence[str | None], device: torch.device | str) -> MixedBatch:
    known = tuple(record.name for record in records)
    index: dict[str | None, int] = {name: number for number, name in enumerate(known)}
    # An inference tensor would be compiled anew.
    with torch.inference_mode(False):
        owners = torch.tensor([index.get(name, -1) for name in names], device=device)
    return MixedBatch(tuple(names), known, owners)


def close_rows(records: Sequence[Any], batch: MixedBatch) -> None:
    """Ends the mixed batch of these records."""
    batch.open = False
    for record in records:
        record.open_blocks.discard(id(batch))
    # The block's end may run in another context than its start, where `ContextVar.reset` fails: a generator that is closed by
    # somebody else, or blocks that are left in another order than they were entered.
    _ROWS.set(_tracked({record: other for record, other in _ROWS.get().items() if other is not batch}))
    _COMPILING.rows = tuple(pair for pair in _COMPILING.rows if pair[1] is not batch)


def _tracked(batches: Mapping[RowsState, MixedBatch]) -> CallerRows:
    """Returns the batches as rows whose records know that they are in use, until no block and no graph refers to them."""
    if not batches:
        return _NO_ROWS
    rows = CallerRows(batches)
    weakref.finalize(rows, _forget, tuple(rows), id(rows)).atexit = False
    for record in rows:
        record.rows_in_use.add(id(rows))
        _update(record)
    return rows


def current_batch(records: Sequence[Any]) -> MixedBatch | None:
    """Returns the mixed batch of these records for the calling thread or task."""
    rows = _ROWS.get()
    return next((rows[record] for record in records if record in rows), None)


def begin_forward(backbone: nn.Module, inputs: Any, records: Sequence[RowsState]) -> None:
    """Runs before a forward of the whole backbone, while it holds the deltas of these records."""
    if torch.compiler.is_compiling() or not any(record.has_rows for record in records):
        return
    batch = current_batch(records)
    if batch is not None:
        batch.running.append(threading.get_ident())
    if torch.is_grad_enabled():
        mark_inputs(inputs, backbone)


def end_forward(backbone: nn.Module, output: Any, records: Sequence[RowsState]) -> None:
    """Notes the caller's rows on the graph of a forward of the whole backbone, if any rows are in use.

    Args:
        output: what the forward returned; None if it raised.
    """
    if torch.compiler.is_compiling() or not any(record.has_rows for record in records):
        return
    batch = current_batch(records)
    thread = threading.get_ident()
    if batch is not None and thread in batch.running:
        batch.running.remove(thread)
    if output is None or in_backward():
        return
    done = note(output, backbone, ROWS, _ROWS.get()) if torch.is_grad_enabled() else not _makes_graph()
    if not done and batch is not None:
        _set_unrooted(batch)


def _check_names(records: Sequence[Any], names: Sequence[str | None]) -> None:
    known = {record.name: record for record in records}
    if isinstance(names, str) or not len(names):
        raise OptionError(f"rows(..., {names!r}): expected a list with the name of a delta, or None, for each example")
    for name in dict.fromkeys(names):
        if name is None:
            continue
        if name not in known:
            raise no_such_delta("rows", name, known)
        if not known[name].active or known[name].merged:
            found = "merged; unmerge() it" if known[name].merged else "not active; set its active = True"
            raise StateError(f"rows: delta {name!r} is {found} first")


def _forget(records: Sequence[RowsState], number: int) -> None:
    for record in records:
        record.rows_in_use.discard(number)
        _update(record)


def _update(record: RowsState) -> None:
    with _LOCK:
        # The garbage collector may call this again between the two halves of a line. Graphs without notes do not show whether
        # they still exist.
        while record.has_rows != (found := bool(record.rows_in_use) or record.unrooted):
            record.has_rows = found


def _set_unrooted(batch: MixedBatch) -> None:
    for record, other in _ROWS.get().items():
        if other is batch:
            record.unrooted = True


def _makes_graph() -> bool:
    """Returns whether a backward pass may go through this call.

    Reentrant checkpointing makes its graph outside of the call, which is without gradients but inside an autograd function.
    """
    if torch.is_grad_enabled():
        return True
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("ctx",):
            return True
        frame = frame.f_back
    return False


def _can_be_suspended() -> bool:
    """Returns whether the code that enters a block may be suspended inside it, so that other callers run in this thread."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("deltakit", "contextlib"):
        frame = frame.f_back
    if frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return True
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
