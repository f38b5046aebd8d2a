"""Linear layers whose values a method sets or loads."""

from typing import Any

from torch import nn


class _Unfilled(nn.Linear):
    def reset_parameters(self) -> None:
        # The method sets or loads all values. nn.Linear's own take 0.6 ms at size 64 on 768 features (measured).
        pass


def unfilled_linear(d_in: int, d_out: int, **like: Any) -> nn.Linear:
    """Returns a plain linear layer whose values are not set."""
    layer = _Unfilled(d_in, d_out, **like)
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    return layer
