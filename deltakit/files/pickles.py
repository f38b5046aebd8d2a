"""Reads pickles of tensors, which older libraries save. A pickle may hold anything; what is no tensor is not run."""

from pathlib import Path

import torch
from torch import Tensor

from deltakit.errors import CheckpointError
from deltakit.files.tensor_file import read_tensors


def read_either(folder: Path, safe: str, pickle: str, *, values: bool) -> dict[str, Tensor] | None:
    """Returns the tensors in a folder, from the safetensors file if there is one, else from the pickle; None without either.

    Raises:
        CheckpointError: if the file is damaged, or holds more than tensors by name.
    """
    if (folder / safe).is_file():
        return read_tensors(folder / safe, values=values)
    return read_pickle(folder / pickle, values=values) if (folder / pickle).is_file() else None


def read_pickle(file: Path, *, values: bool = True) -> dict[str, Tensor]:
    """Returns the tensors of a file that `torch.save` wrote, on the CPU.

    Args:
        values: whether their values are needed; else the tensors are on the meta device.

    Raises:
        CheckpointError: if it is damaged, or holds more than tensors by name.
    """
    device = "cpu" if values else "meta"
    try:
        found = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} is damaged, or holds more than tensors: {type(error).__name__}; save it again as safetensors"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(t, Tensor) and t.is_meta is not values for t in found.values()
    ):
        raise CheckpointError(f"{file} holds more than tensors; save it again as safetensors")
    for name, tensor in found.items():
        # A tensor that repeats one value (stride 0) may claim any size, and would take that memory when it is copied.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{file} is damaged: {name} has {tensor.numel():,} values, and the file has not as many; save it again"
            )
    return {str(name): tensor for name, tensor in found.items()}
