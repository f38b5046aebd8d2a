"""Parts of a fused projection: which features of its output are queries, keys or values."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class FeatureSlice:
    """The features [start, stop) of each of `groups` equal parts of an output, and what they are (`q`, `k` or `v`).

    One group is the plain layout (GPT-2: q, k, v one after the other); a group a head is the interleaved one (GPT-NeoX).
    """

    name: str
    groups: int
    stride: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many features there are in all groups together."""
        return self.groups * (self.stop - self.start)

    @property
    def total(self) -> int:
        """How many features the whole output has."""
        return self.groups * self.stride

    def take(self, whole: Float[Tensor, "*batch d_whole"]) -> Float[Tensor, "*batch d_part"]:
        """The features of this part alone.

        >>> FeatureSlice("k", groups=2, stride=3, start=1, stop=2).take(torch.tensor([0.0, 1, 2, 3, 4, 5]))
        tensor([1., 4.])
        """
        return whole.unflatten(-1, (self.groups, self.stride))[..., self.start : self.stop].flatten(-2)

    def spread(self, part: Float[Tensor, "*batch d_part"]) -> Float[Tensor, "*batch d_whole"]:
        """The whole output with these features, and zero for all others.

        >>> FeatureSlice("k", groups=2, stride=3, start=1, stop=2).spread(torch.tensor([1.0, 4]))
        tensor([0., 1., 0., 0., 4., 0.])
        """
        apart = part.unflatten(-1, (self.groups, self.stop - self.start))
        return F.pad(apart, (self.start, self.stride - self.stop)).flatten(-2)

    def replaced(
        self, whole: Float[Tensor, "*batch d_whole"], part: Float[Tensor, "*batch d_part"]
    ) -> Float[Tensor, "*batch d_whole"]:
        """The whole output with these features replaced, and all others as they are.

        >>> FeatureSlice("k", groups=2, stride=3, start=1, stop=2).replaced(torch.zeros(6), torch.tensor([1.0, 4]))
        tensor([0., 1., 0., 0., 4., 0.])
        """
        groups = whole.unflatten(-1, (self.groups, self.stride))
        apart = part.unflatten(-1, (self.groups, self.stop - self.start))
        return torch.cat([groups[..., : self.start], apart, groups[..., self.stop :]], -1).flatten(-2)


def slice_where(name: str, hits: Tensor) -> FeatureSlice | None:
    """The rows that a mask over an output's features picks; None if they are not the same in equal groups.

    >>> slice_where("q", torch.tensor([True, False, False, True, False, False]))
    FeatureSlice(name='q', groups=2, stride=3, start=0, stop=1)
    """
    starts = [i for i in range(len(hits)) if hits[i] and (i == 0 or not hits[i - 1])]
    if not starts or len(hits) % len(starts):
        return None
    stride = len(hits) // len(starts)
    length = int(hits.sum()) // len(starts)
    rows = FeatureSlice(name, len(starts), stride, starts[0], starts[0] + length)
    if rows.stop > stride:
        return None
    whole = rows.spread(torch.ones(rows.size)).bool()
    return rows if torch.equal(whole, hits.cpu()) else None
