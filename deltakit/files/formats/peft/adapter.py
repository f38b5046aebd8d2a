"""An adapter of PEFT as its reader sees it, before anything is known about its kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltakit.core import module_at, names_by_id, tensors_of
from deltakit.files.formats.adapter_config import CONFIG


@dataclass(frozen=True)
class Adapter:
    """The config and the tensors of an adapter, and the backbone that it is read for."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """By name, without PEFT's prefix."""
    backbone: nn.Module | None

    @property
    def config_file(self) -> Path:
        """The config, for error messages."""
        return self.folder / CONFIG

    @cached_property
    def own(self) -> dict[str, Tensor]:
        """The backbone's tensors by name; empty without a backbone."""
        return dict(tensors_of(self.backbone)) if self.backbone is not None else {}

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

    def parts(self, suffixes: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors whose names end with one of these, by the path of their target and their name in deltakit."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            for suffix, ours in suffixes.items():
                if name.endswith(suffix):
                    found.setdefault(name.removesuffix(suffix), {})[ours] = tensor
        return found
