"""What a selector picked: a module, a parameter or a feature slice of a fused projection."""

from dataclasses import dataclass

import torch
from torch import nn

from deltakit.core.feature_slice import FeatureSlice


@dataclass(frozen=True)
class WeightRead:
    """Where a weight is read directly: the forward of the module at `scope` uses its values (`F.linear(x, self.proj.weight)`).

    `holder` is the path below the scope of the module that holds it, by `name` if that is not the target's own. `also` are
    further places where it is read: by the other modules that hold it (tied weights), or by the holder itself.
    `never_called`: the holder is sure not to be called as a module.
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


@dataclass(frozen=True)
class Target:
    """What a selector picked: a module, a parameter of one, or a feature slice of a fused projection.

    Its path; the module that it is, or that holds it; and other paths under which the same instance is registered.
    `width` is the size of the hidden states in the block around it, in elements, where the structure tells. `weight_read`
    says where its weight is read directly, `tied` under which other names it is held. `around` is the dtype of the nearest
    parameters around it that are in floating point. `roles` are those that it answers, such as `ff.down`.
    """

    path: str
    module: nn.Module
    aliases: tuple[str, ...] = ()
    width: int | None = None
    parameter: str = ""
    feature_slice: FeatureSlice | None = None
    weight_read: WeightRead | None = None
    tied: tuple[str, ...] = ()
    around: torch.dtype | None = None
    roles: frozenset[str] = frozenset()

    @property
    def never_called(self) -> bool:
        """Whether no hook on the target's module sees its values used: it is a parameter, or its module is never called."""
        return bool(self.parameter or (self.weight_read is not None and self.weight_read.never_called))

    @property
    def part(self) -> str:
        """What of the module it is: "" for the module, a parameter's name, and a feature slice in brackets."""
        return self.parameter + (f"[{self.feature_slice.name}]" if self.feature_slice is not None else "")

    @property
    def owner(self) -> str:
        """The path of the module: the target's own path without the parameter or the feature slice."""
        return self.path.removesuffix(self.part).removesuffix(".") if self.part else self.path
