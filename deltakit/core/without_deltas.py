"""Whether state dicts leave deltas out, in this thread or task.

torch asks each child module for its own state dict, so a delta module can leave itself out of the state dict of a backbone.
Other threads that save the same model at that moment still get everything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LEFT_OUT: ContextVar[bool] = ContextVar("deltakit_deltas_left_out", default=False)


def deltas_left_out() -> bool:
    """Returns whether the caller is in a `without_deltas` block."""
    return _LEFT_OUT.get()


@contextmanager
def without_deltas() -> Iterator[None]:
    """In this block, state dicts have no tensors of delta modules."""
    token = _LEFT_OUT.set(True)
    try:
        yield
    finally:
        _LEFT_OUT.reset(token)
