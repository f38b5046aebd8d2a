"""Principal components of vectors that come in batches.

Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 3.1, as scikit-learn and EVA's authors have it.
"""

import math

import torch
from torch import Tensor

from deltakit.core import wide


class Components:
    """The first principal components of all vectors so far, exact while they are no more than `most`.

    Args:
        most: how many components are kept between batches.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0
        self.mean = self.values = self.vectors = torch.empty(0)
        self.total = 0.0
        """The sum of the squared distances from the mean."""

    def add(self, x: Tensor) -> None:
        """Adds vectors [tokens, d]."""
        if not len(x):
            return
        x = wide(x)
        mean = x.mean(0)
        rows = [x - mean]
        self.total += float(rows[0].square().sum())
        if self.count:
            # The distance between the means of the earlier vectors and of these, as one more row.
            weight = self.count * len(x) / (self.count + len(x))
            apart = weight**0.5 * (self.mean - mean)
            self.total += float(apart.square().sum())
            rows = [self.values[:, None] * self.vectors, rows[0], apart[None]]
            mean = (self.count * self.mean + len(x) * mean) / (self.count + len(x))
        self.count += len(x)
        if not math.isfinite(self.total):
            # There is no decomposition then.
            return
        _, values, vectors = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        self.values, self.vectors = values[: self.most], vectors[: self.most]
        self.mean = mean

    def shares(self) -> list[float]:
        """Returns the shares of the variance that the components explain, in [0, 1], the largest first."""
        return (self.values.square() / self.total).tolist() if self.total else [0.0] * len(self.values)
