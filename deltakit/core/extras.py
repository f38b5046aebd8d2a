"""Extras: what other rooms keep in a delta's file beside the delta, such as the template and the verbalizer of a prompt model.

An extra is plain data and tensors. A loaded delta has both as they were read; who made them reads them again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

MARK = "@"
"""Starts the names of extras' tensors in files. No path of a module does."""


class Extra(Protocol):
    """What is kept under one name."""

    def data(self) -> Mapping[str, Any]:
        """Returns plain data, as JSON holds it."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns tensors by names without `@`. Under FSDP2 every process calls it."""
        ...


@dataclass(frozen=True)
class StoredExtra:
    """An extra as it was read from a file."""

    stored_data: Mapping[str, Any]
    stored_tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def data(self) -> Mapping[str, Any]:
        """Returns the plain data."""
        return self.stored_data

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the tensors."""
        return self.stored_tensors


def extra_tensors(extras: Mapping[str, Extra]) -> dict[str, Tensor]:
    """Returns the tensors of all extras, by their names in a file: `@extra.tensor`."""
    return {
        f"{MARK}{name}.{key}": tensor.detach()
        for name, extra in extras.items()
        for key, tensor in extra.tensors().items()
    }


def stored_extras(
    data: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, StoredExtra], Mapping[str, Tensor]]:
    """Returns the extras of a file, and its other tensors: without extras the same mapping.

    Args:
        data: the plain data of each extra. Tensors of an extra without data are among the others.
    """
    if not data:
        return {}, tensors
    found = {}
    for name, own in data.items():
        mine = {key: tensor for key, tensor in tensors.items() if is_extra(key, [name])}
        found[name] = StoredExtra(dict(own), {key.removeprefix(f"{MARK}{name}."): value for key, value in mine.items()})
    return found, {key: tensor for key, tensor in tensors.items() if not is_extra(key, data)}


def is_extra(tensor: str, extras: Iterable[str]) -> bool:
    """Returns whether a tensor in a file, by its name, belongs to one of these extras."""
    return any(tensor.startswith(f"{MARK}{name}.") for name in extras)
