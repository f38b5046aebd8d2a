"""Output maps: y' = f(x, y)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import (
    BareLayer,
    Design,
    MixedBatch,
    Target,
    checked,
    hidden_input,
    hidden_output,
    replace_hidden,
    weight_view,
)
from deltakit.errors import TargetError
from deltakit.ops.kinds.maps import LayerMap, in_own_dtype, on_own_examples
from deltakit.ops.sizes import output_size
from deltakit.selection import feature_axis, features_last


class OutputMap(LayerMap):
    """Changes the output of its target. The author writes `forward(x, y) -> y'`, and `linear_update` if it can be merged.

    `y` has its features in the last dimension, also for channels-first layers, and has only the features of a feature slice;
    `size` is their number. It must not be changed in place.

    Raises:
        TargetError: if the target is a parameter, or its output size is unknown.
    """

    design: ClassVar[Design] = Design(
        form="f(x, y)", changes="output", insertion="sequential", composition="replacement"
    )
    weighable: ClassVar[bool] = True

    add_to: Literal["output", "input"] = "output"
    """What its change is added to: the target's output, or the input of a norm (`Bottleneck`)."""

    @checked
    def __init__(self, target: Target) -> None:
        super().__init__()
        self.size = output_size(target, self.word())
        self.view = weight_view(target)
        self.feature_slice = target.feature_slice
        self.axis = feature_axis(target.module)
        self.width = self.feature_slice.total if self.feature_slice is not None else self.size

    def forward(self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Returns the target's new output for the input x and the output y."""
        raise NotImplementedError(f"{type(self).__name__} does not override forward(x, y)")

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        y = output if type(output) is Tensor else hidden_output(output)
        new, strength = self._applied(hidden_input(args, kwargs), y), self.strength
        new = new if strength == 1 else torch.lerp(y, new, strength)
        return new if y is output else replace_hidden(output, new)

    def _applied(self, x: Tensor, y: Tensor, *alike: Tensor) -> Tensor:
        """Returns the map of x, y, and between the two what is laid out as y is."""
        if self.axis == -1 and self.feature_slice is None and y.shape[-1] == self.width:
            # As on nearly every target, in each call: there is nothing to move or to cut.
            return in_own_dtype(self, x, *alike, y)
        lasts = [features_last(one, self.axis, self.width) for one in (*alike, y)]
        parts = lasts if self.feature_slice is None else [self.feature_slice.take(last) for last in lasts]
        new = in_own_dtype(self, x, *parts)
        if self.feature_slice is not None:
            new = self.feature_slice.replaced(lasts[-1], new)
        return features_last(new, self.axis, y.shape[-1])

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        return on_own_examples(self, target, args, kwargs, output, batch)

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        weight, bias = self.linear_update(BareLayer(target, self.view))
        if bias is not None and not isinstance(getattr(target, "bias", None), Tensor):
            raise TargetError(
                f"a {type(target).__name__} without a bias has nothing to merge {self.word()} into; leave the delta attached"
            )
        found = {} if weight is None else {"weight": self.view.stored(weight)}
        if bias is None:
            return found
        return {**found, "bias": bias if self.feature_slice is None else self.feature_slice.spread(bias)}
