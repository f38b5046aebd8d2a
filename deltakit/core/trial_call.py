"""One call of a backbone with the user's example inputs, to look at what happens in it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deltakit.core.buffer_ledger import buffer_at, copy_buffers, differs
from deltakit.core.normal_tensors import normal_tensors
from deltakit.core.start_values import same_random_numbers
from deltakit.errors import DeltaError, OptionError

Inputs = Tensor | Mapping[str, Any] | Sequence[Any]
"""What a backbone is called with: one tensor, positional arguments in a list or tuple, or keyword arguments by name."""


def trial_call(backbone: nn.Module, inputs: Inputs, *, where: str) -> Any:
    """Calls a backbone once, in the mode that it is in, and returns what it returns.

    Buffers and random number generators are then as they were before. If the backbone is on the meta device, the inputs are
    moved there.

    Args:
        where: the function that the user called, for the error message.

    Raises:
        OptionError: if the forward raises an exception.
    """
    args, kwargs = _arguments(inputs)
    if _is_meta(backbone):
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    with same_random_numbers(), _same_buffers(backbone):
        try:
            return backbone(*args, **kwargs)
        except DeltaError:
            raise
        except Exception as error:
            raise OptionError(
                f"{where}(inputs=...): the forward of the {type(backbone).__name__} raised {type(error).__name__}: {error}; "
                "pass what you call the model with: a tensor, a list of arguments, or a dictionary of named ones"
            ) from error


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), {**inputs}
    return ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs)), {}


def _is_meta(backbone: nn.Module) -> bool:
    # With an offloading hook of accelerate, parameters on the meta device get values in the forward.
    return all(p.is_meta for p in backbone.parameters()) and not any(hasattr(m, "_hf_hook") for m in backbone.modules())


@contextmanager
def _same_buffers(backbone: nn.Module) -> Iterator[None]:
    """Gives buffers their values back: BatchNorm's statistics move in each forward in training mode."""
    ledger = copy_buffers(backbone)
    try:
        yield
    finally:
        with normal_tensors(), torch.no_grad():
            for name, value in ledger.own.items():
                here = buffer_at(backbone, name)
                # Only where it changed: a graph of the user's may have saved it, with its version.
                if here is not None and here.shape == value.shape and differs(here, value):
                    here.copy_(value)
            ledger.empty_again(backbone)
