"""What a folder holds, in deltakit's own words, whatever the format of its files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

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
    name: str | None = None
    base: str | None = None
    """The Hub id of the backbone, if the files say it."""
    base_class: str | None = None
    fingerprint: Fingerprint | None = None
    """Of the backbone; None if the format has none."""
