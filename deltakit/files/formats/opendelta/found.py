"""A delta of OpenDelta as its reader sees it, before anything is known about its type."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from deltakit.core import METHODS, without_start_values
from deltakit.errors import CheckpointError
from deltakit.files.formats.activations import activation_of
from deltakit.files.formats.format import Parts
from deltakit.files.formats.patterns import Pattern
from deltakit.files.formats.shapes import refuse_integers
from deltakit.files.formats.source import Source
from deltakit.files.schema import checked


@dataclass(frozen=True)
class Found(Source):
    """A delta of OpenDelta."""

    parts: Parts
    read: set[str] = field(default_factory=set)
    """The names of the tensors that belong to the delta's type. What is left was trained beside it."""

    def option(self, name: str, kind: Any, default: Any) -> Any:
        """Returns an option of the config. OpenDelta writes null for some that have their default.

        Raises:
            CheckpointError: if it is of another type.
        """
        value = self.config.get(name)
        return default if value is None else checked(value, kind, self.config_file, name)

    @property
    def activation(self) -> str:
        """The activation of its adapters.

        Raises:
            CheckpointError: if deltakit does not have it.
        """
        return activation_of(self.option("non_linearity", str, "gelu_new"), self.folder)

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
        refuse_integers({name: tensor for name, tensor in self.tensors.items() if name in self.read}, self.folder)
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
