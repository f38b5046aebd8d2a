"""Gates: the probability of each candidate, with which a structure has the budget's number of parameters on average.

Hu et al. 2022, "Sparse Structure Search for Delta Tuning", https://arxiv.org/abs/2206.07382, section 3: p = sigma((alpha -
zeta) / beta) with one shift zeta for all candidates, and binary concrete samples of each gate.
"""

import torch
from torch import Tensor, nn

_HALVINGS = 60


class Gates(nn.Module):
    """One trained number for each candidate, and the current sample of all gates.

    Args:
        sizes: the number of parameters of each candidate.
        budget: the number of parameters that a structure has on average.
        beta: the width of the sigmoid. The smaller it is, the sooner a gate is open or closed.
    """

    def __init__(self, sizes: list[int], budget: int, *, beta: float, seed: int) -> None:
        super().__init__()
        self.budget, self.beta = budget, beta
        self.sizes = torch.tensor(sizes, dtype=torch.float64)
        self.alpha = nn.Parameter(torch.zeros(len(sizes), dtype=torch.float64))
        self.generator = torch.Generator().manual_seed(seed)
        self.values = torch.ones(len(sizes), dtype=torch.float64)
        """The sample: a factor in [0, 1] for the effect of each candidate."""

    def probabilities(self) -> Tensor:
        """Returns p [candidates], with sum(sizes * p) = budget; ones if all candidates fit.

        The shift is a constant for autograd. So the sum of all p is held as it is there, too: otherwise the gradient would
        mostly say that more parameters are better.
        """
        if self.sizes.sum() <= self.budget:
            return torch.ones_like(self.alpha)
        p = torch.sigmoid((self.alpha - self._shift()) / self.beta)
        return p * (p.detach().sum() / p.sum())

    def _shift(self) -> Tensor:
        # The number of parameters falls as the shift grows. At the ends all gates are exactly open or closed.
        alpha = self.alpha.detach()
        low, high = alpha.min() - 50 * self.beta, alpha.max() + 50 * self.beta
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = (self.sizes * torch.sigmoid((alpha - middle) / self.beta)).sum() > self.budget
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2

    def draw(self) -> Tensor:
        """Returns a sample of all gates in [0, 1] (binary concrete, temperature 1), with the gradient of alpha."""
        p = self.probabilities().clamp(1e-12, 1 - 1e-12)
        u = torch.rand(len(p), generator=self.generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        return torch.sigmoid(torch.log(u * p) - torch.log((1 - u) * (1 - p)))
