"""FeatureSlice: the features of a fused projection's output that are its queries, keys or values."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class FeatureSlice:
    """The features [start, stop) of each of `groups` equal parts of an output. `name` is `q`, `k` or `v`.

    The plain layout has one group (GPT-2: q, k, v in sequence). The interleaved layout has one group per head (GPT-NeoX).
    """

    name: str
    groups: int
    stride: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of its features in all groups together."""
        return self.groups * (self.stop - self.start)

    @property
    def total(self) -> int:
        """The number of features of the full output."""
        return self.groups * self.stride

    def take(self, whole: Float[Tensor, "*batch d_whole"]) -> Float[Tensor, "*batch d_part"]:
        """Returns the features of this slice alone.

        >>> FeatureSlice("k", groups=2, stride=3, start=1, stop=2).take(torch.tensor([0.0, 1, 2, 3, 4, 5]))
        tensor([1., 4.])
        """
        return whole.unflatten(-1, (self.groups, self.stride))[..., self.start : self.stop].flatten(-2)

    def spread(self, part: Float[Tensor, "*batch d_part"]) -> Float[Tensor, "*batch d_whole"]:
        """Returns a full output with these features, and zeros for all others.

        >>> FeatureSlice("k", groups=2, stride=3, start=1, stop=2).spread(torch.tensor([1.0, 4]))
        tensor([0., 1., 0., 0., 4., 0.])
        """
        apart = part.unflatten(-1, (self.groups, self.stop - self.start))
        return F.pad(apart, (self.start, self.stride - self.stop)).flatten(-2)

    def replaced(
        self, whole: Float[Tensor, "*batch d_whole"], part: Float[Tensor, "*batch d_part"]
    ) -> Float[Tensor, "*batch d_whole"]:
        """Returns the full output with these features replaced and all others unchanged.

        >>> FeatureSlice("k", groups=2, stride=3, start=1, stop=2).replaced(torch.zeros(6), torch.tensor([1.0, 4]))
        tensor([0., 1., 0., 0., 4., 0.])
        """
        groups = whole.unflatten(-1, (self.groups, self.stride))
        apart = part.unflatten(-1, (self.groups, self.stop - self.start))
        return torch.cat([groups[..., : self.start], apart, groups[..., self.stop :]], -1).flatten(-2)


def slice_where(name: str, hits: Bool[Tensor, " d_out"]) -> FeatureSlice | None:
    """Returns the feature slice that a mask over an output's features picks.

    It is None if the features are not at the same positions in groups of equal size.

    >>> slice_where("q", torch.tensor([True, False, False, True, False, False]))
    FeatureSlice(name='q', groups=2, stride=3, start=0, stop=1)
    """
    starts = [i for i in range(len(hits)) if hits[i] and (i == 0 or not hits[i - 1])]
    if not starts or len(hits) % len(starts):
        return None
    stride = len(hits) // len(starts)
    length = int(hits.sum()) // len(starts)
    found = FeatureSlice(name, len(starts), stride, starts[0], starts[0] + length)
    if found.stop > stride:
        return None
    mask = found.spread(torch.ones(found.size)).bool()
    return found if torch.equal(mask, hits.cpu()) else None
