"""Input maps: they call the target with x' = f(x)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import BareLayer, Design, Target, checked, hidden_input, linear_sizes, replace_input, weight_view
from deltakit.errors import TargetError
from deltakit.ops.kinds.maps import LayerMap, in_own_dtype
from deltakit.ops.sizes import input_size
from deltakit.selection import feature_axis, features_last


class InputMap(LayerMap):
    """Changes the input of its target. The author writes `into(x) -> x'`, and `linear_update` if it can be merged.

    `x` has its features in the last dimension, also for channels-first layers; `size` is their number. It must not be changed
    in place.

    Raises:
        TargetError: if the target is a feature slice, a parameter or an embedding, or its input size is unknown.
    """

    design: ClassVar[Design] = Design(form="f(x)", changes="input", insertion="sequential", composition="replacement")

    @checked
    def __init__(self, target: Target) -> None:
        super().__init__()
        if target.feature_slice is not None:
            raise TargetError(
                f"{target.path}: {self.word()} changes the input, which all parts of a fused projection share; "
                f"write at='{target.owner}' to change it for all of them"
            )
        self.size = input_size(target, self.word())
        self.view = weight_view(target)
        self.axis = feature_axis(target.module)

    def into(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Returns the target's new input for the input x."""
        raise NotImplementedError(f"{type(self).__name__} does not override into(x)")

    def forward(self, x: Shaped[Tensor, "*input"]) -> Shaped[Tensor, "*input"]:
        # `__call__` comes here. Calling `into` directly would skip the module's hooks, by which FSDP2 and accelerate load
        # its parameters.
        return self.into(x)

    def before_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = self.batch
        if batch is not None and self.record is not None and self.record.name not in batch.names:
            return None
        x = hidden_input(args, kwargs)
        if not x.is_floating_point():
            raise TargetError(
                f"{self.word()}: expected hidden states as the input of this {type(target).__name__}, found "
                f"{x.dtype} of shape {tuple(x.shape)}; leave this module out with exclude="
            )
        if batch is None or self.record is None:
            return replace_input(args, kwargs, self._applied(x))
        rows = batch.of(self.record.name, x, target)
        return replace_input(args, kwargs, x.index_copy(0, rows, self._applied(x.index_select(0, rows))))

    def _applied(self, x: Tensor) -> Tensor:
        new = features_last(in_own_dtype(self, features_last(x, self.axis, self.size)), self.axis, x.shape[-1])
        return new if self.strength == 1 else torch.lerp(x, new, self.strength)

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        convolution = isinstance(target, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not convolution and linear_sizes(target) is None:
            raise TargetError(
                f"a {type(target).__name__} is no linear map of its input, so {self.word()} cannot be merged into it; "
                "leave the delta attached"
            )
        if convolution and target.groups != 1:
            # Each of its rows has the channels of one group alone.
            raise TargetError(
                f"{self.word()} on the input of a {type(target).__name__} in groups cannot be merged; leave the delta attached"
            )
        weight, bias = self.linear_update(BareLayer(target, self.view))
        found = {"weight": None if weight is None else self.view.stored(weight), "bias": bias}
        return {name: update for name, update in found.items() if update is not None}
