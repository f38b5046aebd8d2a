"""Checks of options that several methods share."""

import torch

from deltakit.core import PerTarget, values_of
from deltakit.errors import OptionError


def check_dropout(where: str, dropout: float) -> None:
    """Refuses a dropout that is no probability.

    Args:
        where: the class that got it, for the error message.

    Raises:
        OptionError: if it is out of [0, 1).
    """
    if not 0 <= dropout < 1:
        raise OptionError(f"{where}(dropout={dropout}): expected a probability in [0, 1)")


def check_alpha(where: str, alpha: PerTarget[float]) -> None:
    """Refuses an alpha that no update can be multiplied by.

    Args:
        where: the class that got it, for the error message.

    Raises:
        OptionError: if it is negative, not finite, or beyond what float32 holds.
    """
    # Beyond what float32 holds, torch refuses to multiply by it.
    if not all(0 <= one <= torch.finfo(torch.float32).max for one in values_of(alpha)):
        raise OptionError(
            f"{where}(alpha={alpha}): expected a finite number of at least 0 that float32 holds; r or 2 * r is usual"
        )
