"""Products of tensors in a file of somebody else, which may be far larger than the file."""

from pathlib import Path

from torch import Tensor

from deltakit.errors import CheckpointError

_SMALL = 2**20


def product(a: Tensor, b: Tensor, where: Path) -> Tensor:
    """Returns a @ b.

    Raises:
        CheckpointError: if the two do not fit each other, or the product has many more values than they have: a column times a
            row of a million each would take terabytes.
    """
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise CheckpointError(
            f"{where}: tensors of shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit each other; save or "
            "download it again"
        )
    size = a.numel() // max(a.shape[-1], 1) * b.shape[-1]
    if size > 4 * (_SMALL + a.numel() + b.numel()):
        raise CheckpointError(
            f"{where} is damaged: tensors of shapes {tuple(a.shape)} and {tuple(b.shape)} have a product of {size:,} values; "
            "save or download it again"
        )
    return a @ b
