"""What a folder holds, in deltakit's own words, whatever the format of its files."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from deltakit.core import StoredExtra
from deltakit.files.schema import Fingerprint, MethodEntry


class Trained(NamedTuple):
    """The fully trained tensors: the selectors that the user wrote, if any, and what names the tensors, folded or not."""

    selectors: Sequence[str] = ()
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Saved:
    """A delta as it was saved.

    `methods` have the paths of their targets, folded or not. `tensors` have the names that a `Delta.state_dict()` has.
    """

    methods: Sequence[MethodEntry]
    tensors: Mapping[str, Tensor]
    train: Trained
    in_order: Mapping[int, Sequence[Mapping[str, Tensor]]] = field(default_factory=dict)
    """The tensors of methods, by their number, whose files do not name their targets: those of each of its delta modules that
    has some, in the order of the backbone. Their targets are those that the method takes on the backbone."""
    by_place: Collection[str] = ()
    """The names of the methods whose `targets` are names in the file, because only a backbone shows the modules there."""
    name: str | None = None
    base: str | None = None
    """The Hub id of the backbone, if the files say it."""
    base_class: str | None = None
    fingerprint: Fingerprint | None = None
    """Of the backbone; None if the format has none."""
    extras: Mapping[str, StoredExtra] = field(default_factory=dict)
    """What else the files hold; their tensors are not among `tensors`."""
