"""Pauses Python's garbage collector while thousands of delta modules are built, none of which is garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collections_paused() -> Iterator[None]:
    """Starts no collection inside a `with` block. What is freed by its reference count is freed as always.

    A delta module is about thirty objects that the collector counts, so a large backbone makes it walk through all objects of
    the process again and again: loading a delta with 10,000 targets took half as long again for each target as one with 2,500.
    """
    # Of blocks inside each other, and in several threads, the one that found the collector at work starts it again.
    enabled = gc.isenabled()
    # Inside `try`, because Ctrl-C may come behind each call, and twice, because it may come ahead of the first one's end.
    try:
        try:
            gc.disable()
            yield
        finally:
            _start(enabled)
    finally:
        _start(enabled)


def _start(enabled: bool) -> None:
    if enabled:
        gc.enable()
