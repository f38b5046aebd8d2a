"""Observes the forwards of a backbone that is used with `rows`, so that their graphs tell which rows they had."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from deltakit.core import Record, begin_forward, end_forward
from deltakit.injection.tables import ours, unhook


class RowsHook:
    """One of the two hooks, with the records of the deltas in the module."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records


class BeforeForward(RowsHook):
    """Marks the graph of the inputs, which does not belong to this forward."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        begin_forward(module, (args, kwargs), self.records)


class AfterForward(RowsHook):
    """Notes the rows of the caller on the graph of the output."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        end_forward(module, output, self.records)


def observe_rows(module: nn.Module, records: Sequence[Record]) -> None:
    """Registers the two hooks on a module that is called as a whole, or gives them the records if they are there."""
    hooks = ours(module, RowsHook)
    for hook in hooks:
        hook.records = records
    if not hooks:
        module.register_forward_pre_hook(BeforeForward(records), with_kwargs=True)
        module.register_forward_hook(AfterForward(records), always_call=True)


def forget_rows(module: nn.Module) -> None:
    """Removes the two hooks from a module."""
    # Nearly all modules have no hooks, and all are asked at each attach.
    if module._forward_pre_hooks or module._forward_hooks:
        unhook(module, ours(module, RowsHook))
