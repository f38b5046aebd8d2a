"""The registry of methods, which finds those of deltakit when somebody looks into it; and the names of those in a delta."""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import suppress
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

_Kind = TypeVar("_Kind")
_PACKAGE = "deltakit.methods"


class Registry(MutableMapping[str, _Kind]):
    """The classes of methods by name. Looking one up imports its file in `deltakit/methods`; a list of all, all files.

    So it is complete also if only a part of deltakit is imported, as in a process that only loads a delta. To import all files
    takes 0.2 s, which such a process, and `deltakit inspect`, need not wait for.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._is_complete = False

    def _complete(self) -> dict[str, _Kind]:
        if not self._is_complete:
            for found in iter_modules(import_module(_PACKAGE).__path__):
                import_module(f"{_PACKAGE}.{found.name}")
            self._is_complete = True
        return self._kinds

    def __getitem__(self, name: str) -> _Kind:
        if name not in self._kinds and not self._is_complete and isinstance(name, str):
            # Nearly every file has the name of its method. The package imports a file that is asked for.
            with suppress(AttributeError):
                getattr(import_module(_PACKAGE), name)
        if name not in self._kinds:
            return self._complete()[name]
        kind = self._kinds[name]
        if _is_ours(kind):
            # Another thread may be importing its file just now: then this waits. Otherwise it takes a microsecond.
            import_module(kind.__module__)
        return self._kinds[name]

    def __setitem__(self, name: str, kind: _Kind) -> None:
        self._kinds[name] = kind

    def register(self, name: str, kind: _Kind) -> None:
        """Registers a class that was just made. A user's class stays when deltakit's file of its name is imported later."""
        there = self._kinds.get(name)
        if there is None or not _is_ours(kind) or _is_ours(there):
            self._kinds[name] = kind

    def __delitem__(self, name: str) -> None:
        del self._complete()[name]

    def __iter__(self) -> Iterator[str]:
        # Sorted: which file was imported first, and other threads that register, make no difference.
        return iter(sorted(self._complete()))

    def __len__(self) -> int:
        return len(self._complete())

    def __repr__(self) -> str:
        return repr(self._complete())


def _is_ours(kind: object) -> bool:
    return kind.__module__.startswith(f"{_PACKAGE}.")


def label_among(names: Sequence[str], index: int) -> str:
    """Returns the name of one of several methods, numbered from the second one of the same name on.

    >>> label_among(["lora", "adapter", "lora"], 2)
    'lora_2'
    """
    earlier = names[:index].count(names[index])
    return f"{names[index]}_{earlier + 1}" if earlier else names[index]
