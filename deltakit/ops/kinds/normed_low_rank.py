"""Low-rank updates of a weight's direction, with the norm of each row as a parameter of its own (DoRA)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import (
    DeltaModule,
    MixedBatch,
    Target,
    bare_weight,
    gathered,
    hidden_input,
    hidden_output,
    is_quantized,
    replace_hidden,
    wide,
)
from deltakit.errors import StateError, TargetError
from deltakit.ops.fast_paths import own_output
from deltakit.ops.kinds.low_rank import LowRank
from deltakit.ops.kinds.maps import on_own_examples


class NormedLowRank(LowRank):
    """W' = m (W + s B A) / ||W + s B A||, with one norm and one m per row. The author writes `factors()` and `magnitudes()`.

    W is the backbone's own weight. So the update does not depend on other deltas, and theirs add to it. The norm is a constant
    in the backward pass (section 4.3 of the paper), and is computed without the product B A.

    `dropout` drops inputs of the whole update, as in the authors' code: in training W' x is W x plus the update of dropped x.
    """

    reads_weight: ClassVar[bool] = True

    def refuse_without_norms(self, target: Target) -> None:
        """Refuses a target of whose weight the norms cannot be read.

        Raises:
            TargetError: if it is a quantized embedding.
        """
        weight = target.module._parameters.get("weight")
        if self.embeds and weight is not None and is_quantized(weight):
            raise TargetError(
                f"{target.named}: DoRA needs the norms of the weight, which deltakit cannot read from a quantized embedding; "
                "use LoRA without dora=True here, or leave it out with exclude="
            )

    def magnitudes(self) -> Float[Tensor, "*stack d_out"]:
        """Returns m minus the norms of the rows of W: zeros for an untrained delta, which is then exactly a no-op."""
        raise NotImplementedError(f"{type(self).__name__} does not override magnitudes()")

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        y = output if type(output) is Tensor else hidden_output(output)
        # Read here: accelerate would move an offloaded target that is handed to a call.
        weight = bare_weight(target, self.view)
        new = self(hidden_input(args, kwargs), y, target, own_output(target, self), weight)
        return new if y is output else replace_hidden(output, new)

    def contribution(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        # What the target computes from its bare weight is computed again: y may have the changes of other deltas.
        weight = bare_weight(target, self.view)
        change: Tensor = self(hidden_input(args, kwargs), torch.zeros_like(y), target, False, weight)
        return change

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        return on_own_examples(self, target, args, kwargs, output, batch)

    def forward(
        self,
        x: Shaped[Tensor, "*input"],
        y: Float[Tensor, "*output"],
        layer: nn.Module | None = None,
        alone: bool = False,
        weight: Float[Tensor, "d_out d_in"] | None = None,
    ) -> Float[Tensor, "*output"]:
        """Returns y with the update added: (m / n - 1) W x + (m / n) s B A x, where n is the norm of the rows.

        Args:
            layer: the target.
            alone: whether y is exactly the layer's output, so that W x need not be computed again.
            weight: the target's bare weight.
        """
        assert layer is not None
        assert weight is not None
        if self.drops and not self.embeds:
            x, alone = F.dropout(x, self.dropout), False
        base = _without_bias(layer, y, self._along(y)) if alone else self._product_with(weight, x, layer).to(y.dtype)
        product = super().forward(x, torch.zeros_like(base), layer)
        change = self.gain(weight) - 1
        if self.feature_slice is not None:
            # Other features keep the gain 1.
            change = self.feature_slice.spread(change)
        change = change.to(y.dtype).view(self._along(y))
        return y + change * (base * self.strength) + (1 + change) * product

    def gain(self, weight: Float[Tensor, "*stack d_out d_in"]) -> Float[Tensor, "*stack d_out"]:
        """Returns m / ||W + s B A|| for each row of a weight W, in float32 or wider."""
        a, b = self.factors()
        if weight.shape[-1] != a.shape[-1] or weight.shape[-2] != b.shape[-2]:
            raise StateError(
                f"{self.word()} was attached to a weight of {b.shape[-2]} x {a.shape[-1]}, and it is {weight.shape[-2]} x "
                f"{weight.shape[-1]} now: it was resized (resize_token_embeddings?); detach() the delta and attach a new one"
            )
        before, after = row_norms(weight, a, b, self.scaling)
        return (before + wide(self.magnitudes())) / after

    @torch.no_grad()
    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return DeltaModule.take_sum(self, parts)

    def update(self) -> Float[Tensor, "*stack d_out d_in"]:
        raise NotImplementedError("it depends on the weight: use weight_updates(target)")

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        weight = wide(bare_weight(target, self.view))
        new = self.gain(weight)[..., None] * (weight + super().update())
        return {self.view.name: self.view.stored(new - weight)}

    def _dropped(self, x: Tensor) -> Tensor:
        # `forward` has dropped the inputs already. Those of an embedding are ids: there the vectors are dropped.
        return super()._dropped(x) if self.embeds else x

    def _along(self, y: Tensor) -> tuple[int, ...]:
        """The shape in which a vector of features is multiplied with y: convolutions have their channels first."""
        return (-1, *[1] * (len(self.view.kernel) - 1)) if self.layer_kind == "convolution" else (-1,)

    def _product_with(self, weight: Tensor, x: Tensor, layer: Any) -> Tensor:
        """Returns W x, for all features."""
        if self.layer_kind == "convolution":
            found: Tensor = layer._conv_forward(x, weight.unflatten(1, self.view.kernel).to(x.dtype), None)
            return found
        if self.embeds:
            return F.embedding(x, weight.mT) * getattr(layer, "embed_scale", 1.0)
        base = F.linear(x, weight.to(x.dtype))
        return base if self.feature_slice is None else self.feature_slice.spread(base)


@torch.no_grad()
def row_norms(
    weight: Float[Tensor, "*stack d_out d_in"],
    a: Float[Tensor, "*stack r d_in"],
    b: Float[Tensor, "*stack d_out r"],
    scale: float,
) -> tuple[Float[Tensor, "*stack d_out"], Float[Tensor, "*stack d_out"]]:
    """Returns the norms of the rows of W and of W + scale B A, in float32 or wider.

    They are exactly equal if B A is zero.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    weight, a, b = (tensor.to(dtype) for tensor in (weight, a, b))
    # ||W + s B A||^2 = ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2, row by row. W A^T is the largest product: as for r tokens.
    # Not in the 16 bits of autocast, which round the norms by more than a training step changes them.
    with torch.autocast(weight.device.type, enabled=False):
        before = torch.linalg.vector_norm(weight, dim=-1).square()
        mixed = ((weight @ a.mT) * b).sum(-1)
        own = ((b @ (a @ a.mT)) * b).sum(-1)
    after = (before + 2 * scale * mixed + scale**2 * own).clamp_min(0).sqrt()
    # A row of zeros has no direction, and its product is zero, whatever it is divided by.
    return before.sqrt(), torch.where(after > 0, after, 1)


def _without_bias(layer: nn.Module, y: Tensor, along: tuple[int, ...]) -> Tensor:
    bias = layer._parameters.get("bias", layer._buffers.get("bias"))
    return y if bias is None else y - gathered(bias).to(y.dtype).view(along)
