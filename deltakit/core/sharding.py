"""Gathers and fills tensors that are sharded over processes (FSDP2's DTensors)."""

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is sharded over processes."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """Returns the full tensor on every process. Every process must call it."""
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return full


def gathered_in_training(tensor: Tensor) -> Tensor:
    """Returns the full tensor on every process; its gradient is the mean over the processes, as FSDP2's gradients are.

    For parameters that several blocks share: FSDP2 gathers them in the block that holds them only.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    sharded: Any = tensor
    full: Tensor = sharded.full_tensor(grad_placements=[Partial("avg")] * sharded.device_mesh.ndim)
    return full


def scatter(tensor: Shaped[Tensor, "*shape"], values: Shaped[Tensor, "*shape"]) -> None:
    """Copies values into a tensor. If the tensor is sharded, each process copies its own part."""
    sharded: Any = tensor
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(sharded.device), sharded.device_mesh, sharded.placements)
    sharded.copy_(values)


def is_first() -> bool:
    """Returns whether this process has rank 0 in its process group."""
    return torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    """Waits until every process has called it."""
    torch.distributed.barrier()


def class_name(module: Any) -> str:
    """Returns the name of a module's class, without the class that `fully_shard` adds in front."""
    kind = type(module)
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        kind = next(base for base in kind.__mro__[1:] if base.__name__ != "FSDPModule")
    return str(kind.__name__)
