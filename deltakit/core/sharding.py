"""Tensors that an engine spread over processes (FSDP2's DTensors): put together for a file, and filled from one."""

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The tensor put together, the same on every process; every process must ask for it."""
    sharded: Any = tensor
    together: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return together


def scatter(tensor: Tensor, values: Tensor) -> None:
    """Copies values into a tensor, each process its part of them if the tensor is spread over processes."""
    sharded: Any = tensor
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(sharded.device), sharded.device_mesh, sharded.placements)
    sharded.copy_(values)


def is_first() -> bool:
    """Whether this process is the first of those that run together."""
    return torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    """Returns when every process is here."""
    torch.distributed.barrier()


def class_name(module: Any) -> str:
    """The name of a module's class; of its own one where `fully_shard` put another in front."""
    kind = type(module)
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        kind = next(base for base in kind.__mro__[1:] if base.__name__ != "FSDPModule")
    return str(kind.__name__)
