"""How a new delta was when it was attached: samples of its values, which show later whether it was trained."""

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """What shows whether a parameter was changed: its version, a few of its values, and the sum of all."""

    version: int
    values: Tensor
    total: float


class Start(NamedTuple):
    """A new delta as it was attached: the sum of its parameters' versions, and samples of a few of them by name."""

    version: int
    samples: dict[str, Sample]
