"""Start values of delta modules: which calls draw them, and the random number generators, which all other calls leave alone.

Only attaching a new delta needs start values. A plan never reads them and a load overwrites them, and neither may change the
random numbers of the user's training run, such as the order of its batches.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

_WANTED: ContextVar[bool] = ContextVar("start values are wanted", default=True)


def wants_start_values(*parameters: torch.Tensor) -> bool:
    """Returns whether a new delta module fills these parameters: not if they are on the meta device or nobody reads them."""
    # Meta tensors have no values, but filling them takes as long: plans of models without weights build thousands.
    return _WANTED.get() and not any(parameter.is_meta for parameter in parameters)


@contextmanager
def without_start_values() -> Iterator[None]:
    """Delta modules that are built inside a `with` block need no start values, and no random number generator changes."""
    token = _WANTED.set(False)
    try:
        # A method may draw without asking `wants_start_values`.
        with same_random_numbers():
            yield
    finally:
        _WANTED.reset(token)


@contextmanager
def same_random_numbers(*, only_after_errors: bool = False) -> Iterator[None]:
    """Leaves the random number generators of torch (all devices), Python and numpy as they were before the `with` block.

    Args:
        only_after_errors: whether a block that ends without an exception may change them.
    """
    restore = _restorers()
    try:
        yield
    except BaseException:
        only_after_errors = False
        raise
    finally:
        if not only_after_errors:
            for call in restore:
                call()


def _restorers() -> list[Callable[[], Any]]:
    found: list[Callable[[], Any]] = [
        partial(torch.random.set_rng_state, torch.random.get_rng_state()),
        partial(random.setstate, random.getstate()),
    ]
    # A device that was not used so far has no state yet. Asking for it would start the device.
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            found.append(partial(device.set_rng_state_all, device.get_rng_state_all()))
    if torch.backends.mps.is_available():
        found.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        found.append(partial(numpy.set_state, numpy.get_state()))
    return found
