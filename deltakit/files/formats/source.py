"""What a reader of another library's format has, before anything is known about the method."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import module_at, names_by_id, tensors_of
from deltakit.errors import CheckpointError
from deltakit.files.formats.shapes import refuse_integers
from deltakit.files.schema import checked
from deltakit.selection import BackboneIndex


@dataclass(frozen=True)
class Source:
    """The config and the tensors in a folder or file of another library, and the backbone that they are read for."""

    library: str
    """Who wrote it, for error messages."""
    folder: Path
    config_file: Path
    """The config, for error messages."""
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """By name, without a prefix that all have."""
    backbone: nn.Module | None

    @cached_property
    def own(self) -> dict[str, Tensor]:
        """The backbone's tensors by name; empty without a backbone."""
        return dict(tensors_of(self.backbone)) if self.backbone is not None else {}

    @cached_property
    def index(self) -> BackboneIndex | None:
        """The index of the backbone, if there is one."""
        return BackboneIndex(self.backbone) if self.backbone is not None else None

    @cached_property
    def _names(self) -> Mapping[int, Sequence[str]]:
        return names_by_id(self.own.items())

    def module(self, path: str) -> nn.Module | None:
        """Returns the backbone's module at a path, if there is one."""
        return module_at(self.backbone, path) if self.backbone is not None else None

    def names_of(self, tensor: Tensor | None) -> Sequence[str]:
        """Returns the names of a tensor of the backbone: several if it is tied."""
        return self._names.get(id(tensor), ())

    def is_tied(self, tensor: Tensor | None) -> bool:
        """Returns whether a tensor of the backbone has several names."""
        return len(self.names_of(tensor)) > 1

    def by_path(self, suffixes: Mapping[str, str], integers: Collection[str] = ()) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors whose names end with one of these, by the path of their target and their name in deltakit.

        Args:
            integers: the names in deltakit of those that are no floating-point numbers.

        Raises:
            CheckpointError: if another one is none.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            for suffix, ours in suffixes.items():
                if name.endswith(suffix):
                    found.setdefault(name.removesuffix(suffix), {})[ours] = tensor
                    if ours not in integers:
                        refuse_integers({name: tensor}, self.folder)
        return found

    def options(self, kind: Any, defaults: Mapping[str, Any], within: str = "") -> Any:
        """Returns those fields of the config that a `TypedDict` has, with defaults for those that are absent.

        Args:
            within: the field of the config that holds them; "" for the config itself.

        Raises:
            CheckpointError: if one is of another type, or absent without a default.
        """
        config = self.config[within] if within else self.config
        given = {key: config[key] for key in kind.__annotations__ if key in config}
        return checked({**defaults, **given}, kind, self.config_file, within)

    def refuse_tied(self, found: Mapping[str, Tensor]) -> None:
        """Refuses values of a tied tensor of the backbone that its other names do not get.

        Raises:
            CheckpointError: if there is one.
        """
        for name, tensor in found.items():
            tied = [other for other in self.names_of(self.own[name]) if other != name]
            apart = next((other for other in tied if other not in found or not torch.equal(found[other], tensor)), None)
            if apart is not None:
                raise CheckpointError(
                    f"{self.folder}: it has {name} trained in full, and in this backbone that is tied to {apart}, which "
                    "would change, too; untie the two first"
                )
