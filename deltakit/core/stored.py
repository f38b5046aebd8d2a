"""How many bytes tensors take, wherever they are kept: in this process, and in all of them together."""

from typing import Any

import torch
from torch import Tensor

from deltakit.core.sharding import is_sharded


def local_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor in this process, with those of the constants that a quantizer keeps beside it."""
    held: Any = tensor
    if torch.nn.parameter.is_lazy(tensor):
        return 0
    if hasattr(held, "__tensor_flatten__"):
        return sum(map(local_bytes, inner_tensors(tensor)))
    # DeepSpeed ZeRO-3 leaves an empty parameter, and keeps this process's part beside it.
    part = getattr(held, "ds_tensor", None)
    own: Tensor = tensor if part is None else part
    # bitsandbytes keeps constants beside packed weights: a state in 4 bits, a scale for each row in 8 bits.
    scales = getattr(held, "SCB", None)
    more = _constants(getattr(held, "quant_state", None)) + (scales.nbytes if isinstance(scales, Tensor) else 0)
    return own.numel() * own.element_size() + more


def global_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor in all processes together that share it."""
    held: Any = tensor
    if torch.nn.parameter.is_lazy(tensor):
        return 0
    if is_sharded(tensor):
        return tensor.numel() * tensor.element_size()
    if hasattr(held, "ds_numel"):
        return int(held.ds_numel) * tensor.element_size()
    return local_bytes(tensor)


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Returns the plain tensors that a tensor consists of; a plain one is its own.

    torchao's tensors consist of a packed weight and its scales, and a DTensor of the part of this process.
    """
    held: Any = tensor
    if not hasattr(held, "__tensor_flatten__"):
        return [tensor]
    # Some names are those of other objects, such as a DTensor's mesh.
    parts = [getattr(held, name) for name in held.__tensor_flatten__()[0]]
    return [plain for part in parts if isinstance(part, Tensor) for plain in inner_tensors(part)]


def _constants(state: Any) -> int:
    """The bytes of the constants of a packed weight, which may be quantized themselves."""
    own = [value for value in vars(state).values() if isinstance(value, Tensor)] if state is not None else []
    nested = _constants(getattr(state, "state2", None)) if state is not None else 0
    return sum(tensor.nbytes for tensor in own) + nested
