"""Sums in the place of parameters: what a forward reads while a delta works by the weight.

A sum shadows its parameter in the instance's `__dict__`, where attribute access looks first: so the parameter stays
registered, and state dicts, optimisers and other hooks see nothing of it. Forwards nest (a module that calls itself, a layer
whose hooks stand around it and on it, two threads), and several deltas may be in one weight: so each has a count of its own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

_TABLE = "_deltakit_sums"
_LOCK = Lock()


def _alone() -> AbstractContextManager[Any]:
    # Dynamo traces no locks, and compiles in one thread at a time.
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


def enter(holder: nn.Module, name: str, key: str, update: Callable[[Tensor], Tensor]) -> None:
    """Lets reads of a parameter find it with the update of the delta `key` added, until `leave` was called as often."""
    with _alone():
        _enter(holder, name, key, update)


def _enter(holder: nn.Module, name: str, key: str, update: Callable[[Tensor], Tensor]) -> None:
    table: dict[str, Any] = holder.__dict__.setdefault(_TABLE, {})
    if name not in table:
        table[name] = {"was": holder.__dict__.get(name), "base": getattr(holder, name), "parts": {}}
    entry = table[name]
    update_there, depth = entry["parts"].get(key, (None, 0))
    if update_there is None or (torch.is_grad_enabled() and not update_there.requires_grad):
        # One that was made without a graph serves no forward that needs gradients.
        update_there = update(entry["base"])
        entry["parts"][key] = (update_there, depth + 1)
        _show(holder, name, entry)
    else:
        entry["parts"][key] = (update_there, depth + 1)


def leave(holder: nn.Module, key: str) -> None:
    """Takes back one `enter` of a delta; behind the last of all deltas the parameters are read themselves again."""
    with _alone():
        _leave(holder, key)


def _leave(holder: nn.Module, key: str) -> None:
    table: dict[str, Any] = holder.__dict__.get(_TABLE, {})
    for name in [name for name, entry in table.items() if key in entry["parts"]]:
        entry = table[name]
        update, depth = entry["parts"][key]
        if depth > 1:
            entry["parts"][key] = (update, depth - 1)
            continue
        del entry["parts"][key]
        _show(holder, name, entry)
        if not entry["parts"]:
            del table[name]
    if not table:
        holder.__dict__.pop(_TABLE, None)


def _show(holder: nn.Module, name: str, entry: dict[str, Any]) -> None:
    if entry["parts"]:
        total = entry["base"]
        for update, _ in entry["parts"].values():
            total = total + update.to(total.dtype)
        holder.__dict__[name] = total
    elif entry["was"] is None:
        del holder.__dict__[name]
    else:
        holder.__dict__[name] = entry["was"]
