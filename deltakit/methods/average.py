"""Average: y = y + sum_i w_i a_i for what n deltas add, with fixed weights. It has no parameters.

Wang et al. 2021, https://arxiv.org/abs/2109.04877, section 3: the outputs of several adapters, ensembled. In AdapterHub it is
the composition `Average`, which in version 1.2.0 divides its weighted mean by the number of adapters once more, residual
included, and so makes hidden states smaller. This one does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Target
from deltakit.errors import OptionError
from deltakit.ops import Weighing, WeighingMethod


class AverageDelta(Weighing):
    """The weights of the deltas, as numbers."""

    def __init__(self, target: Target, options: "Average") -> None:
        super().__init__(target, options.deltas)
        self.shares = options.shares()

    def weigh(
        self, h: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"], contributions: Float[Tensor, "n *batch d"]
    ) -> Float[Tensor, "*batch d"]:
        return y + sum(share * one for share, one in zip(self.shares, contributions, strict=True))

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        updates: dict[str, Tensor] = {}
        for share, module in zip(self.shares, self.weighed_at(target), strict=True):
            for name, update in module.scaled_updates(target).items():
                updates[name] = updates[name] + share * update if name in updates else share * update
        return updates

    def summary(self) -> str:
        return "of " + ", ".join(f"{share:.3g} {name}" for share, name in zip(self.shares, self.deltas, strict=True))


@dataclass(frozen=True, kw_only=True)
class Average(WeighingMethod, name="average"):
    """A weighted mean of what other deltas add, without training. It is merged if the deltas can be.

    Args:
        deltas: the names of the averaged deltas, at least two. They are attached to the same backbone before it, under names
            of their own (`attach(..., name=)`), and are not active while it is.
        weights: the weight of each delta, any finite numbers; None for equal ones.
        normalize: whether to divide these weights by their sum, which is then not 0.

    Raises:
        OptionError: if there are not as many weights as deltas, or their sum is 0.
    """

    kind: ClassVar[type[DeltaModule]] = AverageDelta
    design: ClassVar[Design] = Design(form="sum_i w_i a_i", composition="scaled addition")

    weights: Sequence[float] | None = None
    normalize: bool = True

    def validate(self) -> None:
        super().validate()
        if self.weights is None:
            return
        weights = tuple(self.weights)
        if len(weights) != len(self.deltas):
            raise OptionError(
                f"Average(weights={list(weights)}): expected one for each of the {len(self.deltas)} deltas"
            )
        if self.normalize and not sum(weights):
            raise OptionError(
                f"Average(weights={list(weights)}): their sum is 0, so that they cannot be divided by it; write other "
                "weights, or normalize=False"
            )
        object.__setattr__(self, "weights", weights)

    def shares(self) -> tuple[float, ...]:
        """Returns the factor of each delta."""
        if self.weights is None:
            return (1 / len(self.deltas),) * len(self.deltas)
        total = sum(self.weights) if self.normalize else 1.0
        return tuple(weight / total for weight in self.weights)
