"""The registry of methods, which finds those of deltakit when somebody looks into it."""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import TypeVar

_Kind = TypeVar("_Kind")


class Registry(MutableMapping[str, _Kind]):
    """The classes of methods by name. Reading it first imports all files in `deltakit/methods`.

    So it is complete also if only a part of deltakit is imported, as in a process that only loads a delta.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def _complete(self) -> dict[str, _Kind]:
        # Each time: another thread may be importing them just now, and then this waits. Otherwise it takes a microsecond.
        import_module("deltakit.methods")
        return self._kinds

    def __getitem__(self, name: str) -> _Kind:
        return self._complete()[name]

    def __setitem__(self, name: str, kind: _Kind) -> None:
        # While the files are imported they write, and must not wait for each other.
        self._kinds[name] = kind

    def __delitem__(self, name: str) -> None:
        del self._complete()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._complete())

    def __len__(self) -> int:
        return len(self._complete())

    def __repr__(self) -> str:
        return repr(self._complete())
