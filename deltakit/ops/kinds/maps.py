"""What output, input and weight maps share: merging into a layer, examples of a mixed batch, and dtypes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import BareLayer, DeltaModule, MixedBatch, hidden_input, hidden_output, replace_hidden


class LayerMap(DeltaModule):
    """A map of a layer's input or output, which may be a change of its weight and bias."""

    def linear_update(self, layer: BareLayer) -> tuple[Tensor | None, Tensor | None]:
        """Returns what merging adds to the target's weight [d_out, d_in] and bias [d_out], each None for nothing.

        Raises:
            TargetError: by default, because a map that is not linear cannot be merged.
        """
        self.refuse_merging()


def on_own_examples(
    module: DeltaModule,
    target: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    batch: MixedBatch,
    after_call: Callable[..., Any] | None = None,
) -> Any:
    """Calls `after_call` with the examples of a mixed batch that use the module's delta, and puts their outputs back.

    Args:
        after_call: what is called instead of the module's own.

    Returns:
        The new output; None if no example uses the delta.
    """
    if module.record is None or module.record.name not in batch.names:
        return None
    after_call = after_call or module.after_call
    y = hidden_output(output)
    rows = batch.of(module.record.name, y, target)
    if len(rows) == y.shape[0]:
        return after_call(target, args, kwargs, output)
    x = hidden_input(args, kwargs)
    part = after_call(target, (x.index_select(0, rows),), {}, y.index_select(0, rows))
    return replace_hidden(output, y.index_copy(0, rows, part))


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
    """Returns the dtype of the first parameter of a delta module, or of the shared module; without any, that of `given`."""
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
