"""Weight maps: they change a weight, W' = W + dW(W) or W' = f(W), and with it the bias."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import (
    BareLayer,
    DeltaModule,
    Design,
    MixedBatch,
    Target,
    WeightView,
    bare_weight,
    bias_of,
    checked,
    hidden_input,
    hidden_output,
    linear_sizes,
    replace_hidden,
    weight_view,
    wide,
)
from deltakit.ops.fast_paths import fresh, is_dense
from deltakit.ops.kinds.maps import on_own_examples, own_dtype
from deltakit.ops.module_copy import ComputedBy
from deltakit.ops.recompute import Layer, add_linear_with, layer_beside, linear_with


class WeightMap(DeltaModule):
    """Changes a weight of its target. The author writes `weight_update(W) -> dW`, or `new_weight(W) -> W'`.

    W is the backbone's own weight [*stack, d_out, d_in], however the module stores it: dequantized, gathered, only the feature
    slice, and without the updates of other deltas. So several weight maps on one weight add up.

    A kind whose update does not depend on the weight sets `reads_weight = False`, and gets an empty tensor instead.

    A method that also changes the bias writes `bias_update(W, b) -> db`. It is called where the target has a bias, which
    `has_bias` says after `__init__`. With `changes_weight = False` only the bias is changed.

    On a linear layer that is called, the product with dW is added to the output, and dW is recomputed in the backward pass
    instead of saved, so the formulas must draw no random numbers. Elsewhere a weight patch replaces W by W + dW during the
    forward that reads it.
    """

    design: ClassVar[Design] = Design(form="dW(W) x", changes="weight", insertion="parallel", composition="addition")
    has_weight_form: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True
    changes_weight: bool = True
    weighable: ClassVar[bool] = True

    @checked
    def __init__(self, target: Target, view: WeightView | None = None) -> None:
        super().__init__()
        self.view = weight_view(target) if view is None else view
        # A parameter is one weight alone: which bias is added to its product, only the code of its module knows.
        self.has_bias = not target.parameter and bias_of(target.module) is not None
        self.changes_bias = self.has_bias and type(self).bias_update is not WeightMap.bias_update

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns the update of the weight, in the weight's shape."""
        return self.new_weight(weight) - weight

    def new_weight(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns the new weight, in the weight's shape."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither weight_update nor new_weight")

    def bias_update(self, weight: Float[Tensor, "..."], bias: Float[Tensor, " d_out"]) -> Float[Tensor, " d_out"]:
        """Returns the update of the bias, which is in float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} does not override bias_update")

    def forward(
        self, weight: Float[Tensor, "..."], bias: Float[Tensor, " d_out"] | None = None
    ) -> Float[Tensor, "..."]:
        # `__call__` comes here. Calling `weight_update` directly would skip the module's hooks, by which FSDP2 and
        # accelerate load its parameters.
        return self.weight_update(weight) if bias is None else self.bias_update(weight, bias)

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        return target.weight_read is not None or bool(target.parameter) or linear_sizes(target.module) is None

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, y = hidden_input(args, kwargs), hidden_output(output)
        joint = self._joint(target, x, y) if y is output else None
        if joint is not None:
            y = self.add_to_layer(joint, x, target)
            return y + (self._shift(target, x) * self.strength).to(y.dtype) if self.changes_bias else y
        return replace_hidden(output, y + self._update(target, x, y))

    def contribution(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        # Not by `after_call`, which may change y in place.
        return self._update(target, hidden_input(args, kwargs), y).expand_as(y)

    def _update(self, target: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns what is added to y."""
        update = self._change(target, x)
        if self.view.feature_slice is not None:
            update = self.view.feature_slice.spread(update)
        return (update * self.strength).to(y.dtype)

    def product(self, target: nn.Module, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Returns the product of the update with the input x of a linear layer."""
        return linear_with(x, self._built(target))

    def add_to_layer(
        self, layer: Layer, x: Float[Tensor, "*batch d_in"], target: nn.Module
    ) -> Float[Tensor, "*batch d_out"]:
        """Returns the layer's output plus the scaled product of the update with its input x. It may be changed in place."""
        return add_linear_with(layer, x, self._built(target))

    def _built(self, target: nn.Module) -> ComputedBy:
        """Returns what computes the update, again in the backward pass."""
        # The bare weight is computed inside, too: a dequantized, gathered or widened one is as large as the update.
        return ComputedBy(self, lambda own, target: own(own._bare(target)), target, self._weight_read())

    def _weight_read(self) -> tuple[str, ...]:
        return (self.view.name,) if self.reads_weight else ()

    def _joint(self, target: nn.Module, x: Tensor, y: Tensor) -> Layer | None:
        """Returns the target and its output, if one autograd node can serve both; else None."""
        own = self.parameters_read()
        if (
            not self.changes_weight
            or self.view.feature_slice is not None
            or type(self).product is not WeightMap.product
        ):
            return None
        return layer_beside(*fresh(target, self), x, y, own[0], self.strength) if own else None

    def _change(self, target: nn.Module, x: Tensor) -> Tensor:
        """Returns what is added to the target's output: [*batch, d_out], or [d_out] if only the bias is changed."""
        shift = self._shift(target, x) if self.changes_bias else None
        if shift is not None and not self.changes_weight:
            return shift
        # An author's own product reads and writes dense tensors.
        update = self.product(target, x) if is_dense(x) else WeightMap.product(self, target, x)
        return update if shift is None else update + shift

    def _shift(self, target: nn.Module, x: Tensor) -> Float[Tensor, " d_out"]:
        """Returns the update of the bias."""
        # As a product with 1, it is recomputed in the backward pass like the weight, and saves nothing of the weight's size.
        names = (*self._weight_read(), "bias")
        build = ComputedBy(
            self, lambda own, target: own._bias_update(target, own._bare(target))[:, None], target, names
        )
        one = x.new_ones(1) if is_dense(x) else torch.ones(1, dtype=x.dtype, device=x.device)
        return linear_with(one, build)

    def _bias_update(self, target: nn.Module, weight: Tensor) -> Tensor:
        update: Tensor = self(weight, BareLayer(target, self.view).bias)
        return update

    def _bare(self, target: nn.Module) -> Tensor:
        """The bare weight, in the dtype of the delta's parameters if that is wider."""
        if not self.reads_weight:
            # Not read, so it is not dequantized or gathered either.
            return self.parameters_read()[0].new_empty(0)
        weight = bare_weight(target, self.view)
        return weight.to(torch.promote_types(weight.dtype, own_dtype(self, weight)))

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        return on_own_examples(self, target, args, kwargs, output, batch)

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        weight = self._bare(target)
        weight = weight if torch.is_grad_enabled() else wide(weight)
        found = {self.view.name: self.view.stored(self(weight))} if self.changes_weight else {}
        if not self.changes_bias:
            return found
        # A bias is stored as it is, except of a slice: there are zeros in the place of the other features.
        shift, part = self._bias_update(target, weight), self.view.feature_slice
        return {**found, "bias": shift if part is None else part.spread(shift)}
