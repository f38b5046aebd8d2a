"""Notes that the modules around targets ran, for the check of the first forward."""

from threading import get_ident
from typing import Any

import torch
from torch import nn

from deltakit.core import Record, above, is_callable, module_at
from deltakit.injection.tables import unhook


class Ran:
    """Notes the threads in which a module was called, for the checks of these deltas."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.records: list[Record] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        # Dynamo cannot trace the thread, and compiled forwards are not checked.
        if not torch.compiler.is_compiling():
            self.threads.add(get_ident())


def caller_of(backbone: nn.Module, path: str) -> nn.Module:
    """Returns the innermost module at or around a path that can be called: a list of modules cannot."""
    for name in above(path):
        module = module_at(backbone, name)
        if module is not None and is_callable(module):
            return module
    return backbone


def release(module: nn.Module, ran: Ran, record: Record) -> bool:
    """Removes a delta from those that need to know that a module ran, and returns whether none is left."""
    if record in ran.records:
        ran.records.remove(record)
    if not ran.records:
        unhook(module, [ran])
    return not ran.records
