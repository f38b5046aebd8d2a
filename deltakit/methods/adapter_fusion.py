"""AdapterFusion: y = y + sum_i p_i W_v a_i with p = softmax_i((W_q h + b_q) . (W_k a_i + b_k)), for what n deltas add.

Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, section 3.2. a_i is what the delta i would add to the target's output
h, and y is h. In the second stage only the three matrices are trained, so the weighed deltas are frozen. As in the authors'
code, W_q and W_k start at N(0, 0.02^2), W_v at the identity plus 1e-6, and the loss gets 0.01 ||W_v - 1||^2 for each target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Target, gathered_in_training, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import Weighing, WeighingMethod, check_dropout, like, unfilled_linear

_NEAR_IDENTITY = 1e-6


class AdapterFusionDelta(Weighing):
    """The linear layers `query` and `key` [d, d] with biases, and the matrix `value` [d, d] (None without one)."""

    tags: ClassVar[Mapping[str, str]] = {"query": "query", "key": "key", "value": "value"}

    value: nn.Parameter | None

    def __init__(self, target: Target, options: "AdapterFusion") -> None:
        super().__init__(target, options.deltas)
        self.dropout = options.dropout
        self.query, self.key = (unfilled_linear(self.size, self.size, **like(target)) for _ in range(2))
        self.value = nn.Parameter(torch.empty(self.size, self.size, **like(target))) if options.value else None
        if wants_start_values(self.query.weight):
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if self.value is not None:
            self.value.fill_(_NEAR_IDENTITY).fill_diagonal_(1)

    def weigh(
        self, h: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"], contributions: Float[Tensor, "n *batch d"]
    ) -> Float[Tensor, "*batch d"]:
        scores = (self.query(h) * self.key(contributions)).sum(-1)
        shares = F.dropout(scores, self.dropout, self.training).softmax(0)
        values = contributions if self.value is None else F.linear(contributions, self.value)
        return y + (shares[..., None] * values).sum(0)


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(WeighingMethod, name="adapter_fusion"):
    """Attention over what other deltas add: it learns, for each token, how much of each delta is used.

    The weighed deltas are attached by names and not active. Set their `trainable` to False, and add `delta.penalty()` to the
    loss:

    >>> import deltakit as dk
    >>> model = nn.Sequential(nn.Linear(3, 5))
    >>> for name in ("a", "b"):
    ...     dk.attach(model, dk.Adapter(size=2, at="0"), name=name).trainable = False
    >>> fusion = dk.attach(model, AdapterFusion(deltas=("a", "b")), name="fusion")
    >>> print(dk.use(model, "fusion"))
    in use: fusion
    >>> fusion.num_parameters
    85

    Args:
        deltas: the names of the weighed deltas, at least two. They are attached to the same backbone before it, under names
            of their own (`attach(..., name=)`), and are not active while it is.
        value: whether there is a matrix W_v. Without it the method is AdapterHub's "static" one.
        regularization: the factor of ||W_v - 1||^2 in `Delta.penalty`, at least 0.
        dropout: the probability in [0, 1) with which scores are set to zero in training.

    Raises:
        OptionError: if an option is out of its range.
    """

    kind: ClassVar[type[DeltaModule]] = AdapterFusionDelta
    design: ClassVar[Design] = Design(form="sum_i softmax_i(W_q y . W_k a_i) W_v a_i")

    value: bool = True
    regularization: float = 0.01
    dropout: float = 0.0

    def validate(self) -> None:
        super().validate()
        check_dropout(type(self).__name__, self.dropout)
        if not 0 <= self.regularization <= torch.finfo(torch.float32).max:
            raise OptionError(
                f"AdapterFusion(regularization={self.regularization}): expected a finite number of at least 0; 0.01 is usual"
            )

    def penalty(self, modules: Sequence[DeltaModule]) -> Tensor | float:
        if not (self.value and self.regularization):
            return 0.0
        values = [gathered_in_training(module.get_parameter("value")) for module in modules]
        terms = [
            (value - torch.eye(len(value), dtype=value.dtype, device=value.device)).square().sum() for value in values
        ]
        return self.regularization * torch.stack([term.to(terms[0].device) for term in terms]).sum()
