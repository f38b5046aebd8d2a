"""Target: what a selector matched, which is a module, a parameter or a feature slice of a fused projection."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from deltakit.core.feature_slice import FeatureSlice


@dataclass(frozen=True)
class WeightRead:
    """A weight that is read directly: the forward of the module at `scope` uses its values (`F.linear(x, self.proj.weight)`).

    `holder` is the path, below the scope, of the module that holds the weight. `name` is its name there, or "" for the name
    that the target uses. `also` lists further reads: by other modules that hold the weight (tied weights), or by the holder
    itself. `never_called`: the holder is certain not to be called as a module.
    """

    scope: str
    holder: str
    name: str = ""
    also: tuple["WeightRead", ...] = ()
    never_called: bool = False

    @property
    def owner(self) -> str:
        """The path of the holder in the backbone."""
        return ".".join(filter(None, (self.scope, self.holder)))


class Inferred(NamedTuple):
    """What role inference says about a target: the size of the hidden states around it, and its roles."""

    width: int | None = None
    roles: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Target:
    """What a selector matched: a module, a parameter of one, or a feature slice of a fused projection.

    - `path`: its path. `module`: the module itself, or the one that holds the parameter or slice.
    - `aliases`: other paths under which the same module is registered.
    - `parameter`, `feature_slice`: set if the target is only that part of the module.
    - `weight_read`: where its weight is read directly. `tied`: other names of the same weight.
    - `around`: the dtype of the nearest floating-point parameters around it.
    - `inferred`: returns what role inference says about it. Most methods never ask, and inference takes as long as building a
      delta module for each target.
    """

    path: str
    module: nn.Module
    aliases: tuple[str, ...] = ()
    parameter: str = ""
    feature_slice: FeatureSlice | None = None
    weight_read: WeightRead | None = None
    tied: tuple[str, ...] = ()
    around: torch.dtype | None = None
    inferred: Callable[[], Inferred] = Inferred

    @property
    def width(self) -> int | None:
        """The size of the hidden states in the block around it, in elements; None if the structure does not show it."""
        return self.inferred().width

    @property
    def roles(self) -> frozenset[str]:
        """Its roles, such as `ff.down`."""
        return self.inferred().roles

    @property
    def never_called(self) -> bool:
        """Whether hooks on its module cannot change its effect: it is a parameter, or its module is never called."""
        return bool(self.parameter or (self.weight_read is not None and self.weight_read.never_called))

    @property
    def named(self) -> str:
        """What messages call it: its path, or "the backbone" for the backbone itself."""
        return self.path or "the backbone"

    @property
    def part(self) -> str:
        """The parameter's name and the feature slice in brackets, or "" if the target is the full module."""
        return self.parameter + (f"[{self.feature_slice.name}]" if self.feature_slice is not None else "")

    @property
    def owner(self) -> str:
        """The path of the module: the target's own path without the parameter or the feature slice."""
        return self.path.removesuffix(self.part).removesuffix(".") if self.part else self.path
