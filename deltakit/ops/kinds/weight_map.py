"""Weight maps: they change a weight, W' = W + dW(W) or W' = f(W)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import (
    DeltaModule,
    Design,
    MixedBatch,
    Target,
    WeightView,
    bare_weight,
    checked,
    hidden_input,
    hidden_output,
    linear_sizes,
    replace_hidden,
    weight_view,
    wide,
)
from deltakit.ops.kinds.maps import on_own_examples, own_dtype
from deltakit.ops.recompute import linear_with


class WeightMap(DeltaModule):
    """Changes a weight of its target. The author writes `weight_update(W) -> dW`, or `new_weight(W) -> W'`.

    W is the backbone's own weight [*stack, d_out, d_in], however the module stores it: dequantized, gathered, only the feature
    slice, and without the updates of other deltas. So several weight maps on one weight add up.

    A kind whose update does not depend on the weight sets `reads_weight = False`, and gets an empty tensor instead.

    On a linear layer that is called, the product with dW is added to the output, and dW is recomputed in the backward pass
    instead of saved. Elsewhere a weight patch replaces W by W + dW during the forward that reads it.
    """

    design: ClassVar[Design] = Design(form="dW(W) x", changes="weight", insertion="parallel", composition="addition")
    has_weight_form: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True
    weighable: ClassVar[bool] = True

    @checked
    def __init__(self, target: Target, view: WeightView | None = None) -> None:
        super().__init__()
        self.view = weight_view(target) if view is None else view

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns the update of the weight, in the weight's shape."""
        return self.new_weight(weight) - weight

    def new_weight(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns the new weight, in the weight's shape."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither weight_update nor new_weight")

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        # `__call__` comes here. Calling `weight_update` directly would skip the module's hooks, by which FSDP2 and
        # accelerate load its parameters.
        return self.weight_update(weight)

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        return target.weight_read is not None or bool(target.parameter) or linear_sizes(target.module) is None

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, y = hidden_input(args, kwargs), hidden_output(output)
        update = self.product(target, x)
        if self.view.feature_slice is not None:
            update = self.view.feature_slice.spread(update)
        return replace_hidden(output, y + (update * self.strength).to(y.dtype))

    def product(self, target: nn.Module, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Returns the product of the update with the input x of a linear layer."""
        # The bare weight is computed inside, too: a dequantized, gathered or widened one is as large as the update.
        return linear_with(x, lambda: self(self._bare(target)), tuple(self.parameters_read()))

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
        update: Tensor = self(wide(weight) if not torch.is_grad_enabled() else weight)
        return {self.view.name: self.view.stored(update)}
