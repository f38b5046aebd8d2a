"""What a selector picked: a module, a parameter or a part of a fused projection."""

from dataclasses import dataclass

import torch
from torch import nn

from deltakit.core.feature_slice import FeatureSlice


@dataclass(frozen=True)
class WeightRead:
    """Where a weight is read: the module at `scope` uses its values in its forward.

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
    """What a selector picked: a module, a parameter of one, or the rows of a fused projection.

    Its path; the module that it is, or that holds it; and other paths under which the same instance is registered.
    `width` is the size of the hidden states in the block around it, in elements, where the structure tells. `reading`
    says where its weight is read without the module being called, `tied` under which other names it is held. `around` is
    the dtype of the nearest parameters around it that are in floating point.
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
