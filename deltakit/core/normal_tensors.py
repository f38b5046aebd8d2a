"""Makes tensors that outlive a block of `torch.inference_mode`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def normal_tensors() -> AbstractContextManager[Any]:
    """Returns a context in which new tensors are normal ones, also if the caller is in `torch.inference_mode`.

    Tensors that are made in that mode can never be trained, nor be changed in place after it.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
