"""A delta of OpenDelta as its reader sees it, before anything is known about its type."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltakit.core import METHODS, module_at, tensors_of, without_start_values
from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.patterns import Pattern
from deltakit.files.schema import checked
from deltakit.selection import BackboneIndex

ACTIVATIONS = {
    "relu": "relu",
    "tanh": "tanh",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_orig": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "leakyrelu": "leaky_relu",
}
"""What OpenDelta and transformers call the activations that deltakit has."""


@dataclass(frozen=True)
class Found:
    """The config and the tensors of a delta, and the backbone that it is read for."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    backbone: nn.Module | None
    parts: Parts = field(default_factory=Parts)
    read: set[str] = field(default_factory=set)
    """The names of the tensors that belong to the delta's type. What is left was trained beside it."""

    @cached_property
    def own(self) -> dict[str, Tensor]:
        """The backbone's tensors by name; empty without a backbone."""
        return dict(tensors_of(self.backbone)) if self.backbone is not None else {}

    @cached_property
    def index(self) -> BackboneIndex | None:
        """The index of the backbone, if there is one."""
        return BackboneIndex(self.backbone) if self.backbone is not None else None

    def module(self, path: str) -> nn.Module | None:
        """Returns the backbone's module at a path, if there is one."""
        return module_at(self.backbone, path) if self.backbone is not None else None

    def option(self, name: str, kind: Any, default: Any) -> Any:
        """Returns an option of the config. OpenDelta writes null for some that have their default.

        Raises:
            CheckpointError: if it is of another type.
        """
        value = self.config.get(name)
        return default if value is None else checked(value, kind, self.folder / "config.json", name)

    @property
    def activation(self) -> str:
        """The activation of its adapters.

        Raises:
            CheckpointError: if deltakit does not have it.
        """
        name = self.option("non_linearity", str, "gelu_new").lower()
        if name not in ACTIVATIONS:
            raise CheckpointError(
                f"{self.folder}: its adapters have the activation {name!r}, which deltakit does not have; it has "
                f"{', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    def groups(self, pattern: str) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors whose names match: by what is before the match, and by what the match's group is.

        Raises:
            CheckpointError: if two have the same names: OpenDelta numbers several deltas at one module.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            match = re.search(rf"(?:^|\.){pattern}$", name)
            if match is None:
                continue
            here = found.setdefault(name[: match.start()], {})
            if match[1] in here:
                raise CheckpointError(
                    f"{self.folder}: it has two deltas at {name[: match.start()]}, and its config describes one of them; save "
                    "each with the other one detached"
                )
            here[match[1]] = tensor
            self.read.add(name)
        return found

    def names(self) -> list[str]:
        """Returns its `modified_modules`, without those that are names of a common structure: each of them has an @."""
        names: list[str] = self.option("modified_modules", list[str], [])
        return [] if any("@" in name for name in names) else names

    def tensor(self, given: Mapping[str, Tensor], name: str, path: str) -> Tensor:
        """Returns one of the tensors at a path.

        Raises:
            CheckpointError: if it is missing.
        """
        if name not in given:
            raise CheckpointError(f"{self.folder} is damaged: it has no {name} at {path}; save or download it again")
        return given[name]

    def add(
        self,
        method: str,
        options: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        *,
        small: Mapping[str, Any],
    ) -> None:
        """Adds a method with the tensors of its targets, by their paths, and the targets that the method adds itself.

        Args:
            small: options with which it takes little memory, and has the same targets.
        """
        paths = dict.fromkeys(tensors)
        if self.index is not None and all(path in self.index for path in paths):
            with without_start_values():
                built = METHODS[method](**{**options, **small}).build(
                    self.index, [self.index.target(path) for path in paths]
                )
            paths |= dict.fromkeys(built)
        for path in paths:
            self.parts.add(method, options, path, tensors.get(path, {}))


def is_named(path: str, name: str) -> bool:
    """Returns whether a name in `modified_modules` means a module: a regular expression behind [r], else the path's end."""
    if name.startswith("[r]"):
        return Pattern(name[3:], name, Path("config.json") / "modified_modules").is_in(path)
    return path == name or path.endswith(f".{name}")
