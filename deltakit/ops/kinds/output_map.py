"""Output maps: y' = f(x, y)."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import (
    BareLayer,
    DeltaModule,
    MixedBatch,
    Target,
    hidden_input,
    hidden_output,
    replace_hidden,
    weight_view,
)
from deltakit.errors import TargetError
from deltakit.ops.sizes import output_size
from deltakit.selection import feature_axis, features_last


class OutputMap(DeltaModule):
    """Changes the output of its target. The author writes `forward(x, y) -> y'`, and `linear_update` if it can be merged.

    `y` has its features in the last dimension, also for channels-first layers, and has only the features of a feature slice;
    `size` is their number. It must not be changed in place.

    Raises:
        TargetError: if the target is a parameter, or its output size is unknown.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.size = output_size(target, self.word())
        self.view = weight_view(target)
        self.feature_slice = target.feature_slice
        self.axis = feature_axis(target.module)
        self.width = self.feature_slice.total if self.feature_slice is not None else self.size

    def forward(self, x: Tensor, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Returns the target's new output for the input x and the output y."""
        raise NotImplementedError(f"{type(self).__name__} does not override forward(x, y)")

    def linear_update(self, layer: BareLayer) -> tuple[Tensor | None, Tensor | None]:
        """Returns what merging adds to the target's weight [d_out, d_in] and bias [d_out], each None for nothing.

        Raises:
            TargetError: by default, because a map that is not linear cannot be merged.
        """
        raise TargetError(
            f"{type(self).__name__} does not change weights, so it cannot be merged; leave the delta attached"
        )

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        y = output if type(output) is Tensor else hidden_output(output)
        new, strength = self._applied(hidden_input(args, kwargs), y), self.strength
        new = new if strength == 1 else torch.lerp(y, new, strength)
        return new if y is output else replace_hidden(output, new)

    def _applied(self, x: Tensor, y: Tensor) -> Tensor:
        if self.axis == -1 and self.feature_slice is None and y.shape[-1] == self.width:
            # As on nearly every target, in each call: there is nothing to move or to cut.
            return in_own_dtype(self, x, y)
        last = features_last(y, self.axis, self.width)
        part = last if self.feature_slice is None else self.feature_slice.take(last)
        new = in_own_dtype(self, x, part)
        if self.feature_slice is not None:
            new = self.feature_slice.replaced(last, new)
        return features_last(new, self.axis, y.shape[-1])

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        if not self.takes_part or self.record is None:
            return None
        y = hidden_output(output)
        rows = batch.of(self.record.name, y, target)
        if len(rows) == y.shape[0]:
            return self.after_call(target, args, kwargs, output)
        x = hidden_input(args, kwargs)
        part = self.after_call(target, (x.index_select(0, rows),), {}, y.index_select(0, rows))
        return replace_hidden(output, y.index_copy(0, rows, part))

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


def in_own_dtype(module: DeltaModule, *given: Tensor) -> Tensor:
    """Returns the output of a map, computed in the dtype of its parameters, in the dtype of the last given tensor.

    The two dtypes differ under autocast, and where weights are quantized. The map must change the last tensor.
    """
    last = given[-1]
    first = _first_parameter(module)
    own = own_dtype(module, last) if first is None else first.dtype
    if own is last.dtype:
        # Under autocast a map may give another dtype than it is given.
        same: Tensor = module(*given)
        return same if same.dtype is own else same.to(own)
    cast = [tensor.to(own) if tensor.is_floating_point() else tensor for tensor in given]
    new: Tensor = module(*cast)
    if torch.promote_types(own, last.dtype) is own:
        return new.to(last.dtype)
    # The map's dtype is narrower. Only the change is rounded to it, so an untrained map stays the identity.
    return last + (new - cast[-1]).to(last.dtype)


def own_dtype(module: DeltaModule, given: Tensor) -> torch.dtype:
    """The dtype of a delta module's parameters, or of those that all share; that of what it is given, if there are none."""
    first = _first_parameter(module)
    if first is None:
        first = next(iter(module.parameters_read()), None)
    return given.dtype if first is None else first.dtype


def _first_parameter(module: nn.Module) -> Tensor | None:
    # `next(module.parameters())` takes ten times as long, and this is asked in each call.
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = _first_parameter(child) if child is not None else None
        if found is not None:
            return found
    return None
