"""Whether a tensor in a file is the backbone's own: some libraries save the backbone's tensors beside those of the delta."""

import torch
from torch import Tensor


def is_own(tensor: Tensor, held: Tensor) -> bool:
    """Returns whether a tensor has the values that the backbone holds, as far as their dtypes hold them."""
    if tensor.is_meta or held.is_meta or tensor.shape != held.shape:
        return False
    own = held.detach().cpu()
    # The backbone may be in 16 bits and the file in 32, or the other way round.
    return torch.equal(own.to(tensor.dtype), tensor) or torch.equal(tensor.to(own.dtype), own)
