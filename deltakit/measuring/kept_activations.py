"""The bytes that a forward keeps for its backward pass."""

from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import Inputs, inner_tensors, trial_call


def kept_activations(backbone: nn.Module, inputs: Inputs) -> int:
    """Returns the bytes that autograd keeps of one forward, in the mode that the backbone is in.

    Tensors that share their memory count once; parameters and buffers do not count. On the meta device nothing is computed,
    and attention may keep other tensors than on a real one.

    Raises:
        OptionError: if the forward raises an exception.
    """
    own = {_memory(tensor) for tensor in (*backbone.parameters(), *backbone.buffers())}
    # The storages are kept until the sum is made: Python may give the id of one that is gone to another.
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in inner_tensors(tensor):
            key = _memory(part)
            if key not in own:
                kept[key] = part.untyped_storage()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trial_call(backbone, inputs, where="account")
    return sum(storage.nbytes() for storage in kept.values())


def _memory(tensor: Tensor) -> int:
    if torch.nn.parameter.is_lazy(tensor):
        return id(tensor)
    first = next(iter(inner_tensors(tensor)), tensor)
    return int(first.untyped_storage()._cdata)
