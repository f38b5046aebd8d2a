"""A lock that Ctrl-C cannot leave locked."""

from threading import RLock
from typing import Any


class Lock:
    """A lock for statements that are never inside each other.

    Python may raise KeyboardInterrupt between the end of a `with` block and `__exit__`.
    """

    def __init__(self) -> None:
        self.lock: Any = RLock()

    def __enter__(self) -> None:
        # What this thread holds already was left by an interruption.
        while self.lock._is_owned():
            self.lock.release()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
