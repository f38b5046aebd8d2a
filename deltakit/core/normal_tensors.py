"""What `torch.inference_mode` does to tensors: those that outlive a block of it, and those that were made in it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def normal_tensors() -> AbstractContextManager[Any]:
    """Returns a context in which new tensors are normal ones, also if the caller is in `torch.inference_mode`.

    Tensors that are made in that mode can never be trained, nor be changed in place after it.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def version_of(tensor: Tensor) -> int:
    """Returns a number that grows whenever a tensor is changed in place; 0 for those made in `torch.inference_mode`."""
    return 0 if tensor.is_inference() else tensor._version
