"""SHiRA: trains a few entries of a weight, at random places.  Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175, section
3.

Their number is that of the parameters of a LoRA of rank r. What is trained is a difference, which starts at zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import DeltaModule, Design, Target, wants_start_values, wide
from deltakit.errors import CheckpointError, OptionError, TargetError
from deltakit.ops import (
    Layer,
    WeightMap,
    WeightMethod,
    add_sparse,
    are_inside,
    check_seed,
    like,
    matrix_shape,
    seeded_places,
    sparse_entries,
    take_weighted_sum,
)

_USUAL = 32


class SHiRADelta(WeightMap):
    """The differences `values` [*stack, n], which start at zero, and their rows and columns `places` [2, n].

    The places are saved, so that other masks than random ones can be loaded.
    """

    reads_weight: ClassVar[bool] = False
    places: Tensor

    def __init__(self, target: Target, options: "SHiRA") -> None:
        super().__init__(target)
        stack, d_out, d_in = matrix_shape(target, self.word())
        self.shape = d_out, d_in
        n = (options.r or _USUAL) * (d_out + d_in)
        if options.r is not None and n > d_out * d_in:
            fits = d_out * d_in // (d_out + d_in)
            advice = f"use r={fits} or less" if fits else "omit r"
            raise OptionError(
                f"{target.named}: SHiRA(r={options.r}) trains {n} entries, and its weight has {d_out * d_in}; {advice}, or "
                "leave it out with exclude="
            )
        self.options, n = (options.r, options.seed), min(n, d_out * d_in)
        self.values = nn.Parameter(torch.zeros(*stack, n, **like(target)))
        self.register_buffer("places", torch.zeros(2, n, dtype=torch.int32, device=self.values.device))
        if wants_start_values(self.values):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.values)
        index = seeded_places(self.shape[0] * self.shape[1], self.values.shape[-1], self.options[1])
        # In the order of the rows, as a file of PEFT has them.
        index = index.sort().values
        self.places.copy_(torch.stack((index // self.shape[1], index % self.shape[1])))

    def weight_update(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "*stack d_out d_in"]:
        values, (rows, columns) = wide(self.values), self.places.long()
        matrix = values.new_zeros(*values.shape[:-1], self.shape[0] * self.shape[1])
        return matrix.index_add(-1, rows * self.shape[1] + columns, values).unflatten(-1, self.shape)

    def add_to_layer(
        self, layer: Layer, x: Float[Tensor, "*batch d_in"], target: nn.Module
    ) -> Float[Tensor, "*batch d_out"]:
        # An author's subclass or a replaced method may have another formula.
        if type(self) is SHiRADelta and "weight_update" not in self.__dict__:
            entries = sparse_entries(self, self.values, self.places, self.shape, x)
            if entries is not None:
                return add_sparse(layer, x, self.values, entries)
        return super().add_to_layer(layer, x, target)

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        """Loads values and places.

        Raises:
            CheckpointError: if a place is outside of the weight.
        """
        places = state.get("places")
        if (
            places is not None
            and not places.is_meta
            and places.shape == self.places.shape
            and not are_inside(places, self.shape)
        ):
            raise CheckpointError(
                f"SHiRA has places outside of a weight of {self.shape[0]} to {self.shape[1]}; the file is damaged"
            )
        super().load_saved(state)

    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        own = [part for _, part in parts if isinstance(part, SHiRADelta)]
        if any(not torch.equal(part.places, own[0].places) for part in own):
            raise TargetError("SHiRA has sums of one set of places only; run the deltas one by one")
        self.places.copy_(own[0].places)
        return take_weighted_sum(self, "values", parts)

    def summary(self) -> str:
        return f"n={self.values.shape[-1]}"


@dataclass(frozen=True, kw_only=True)
class SHiRA(WeightMethod, name="shira"):
    """Trained entries of a weight at random places.

    Args:
        r: as many entries are trained as a LoRA of this rank has; at least 1. By default those of 32, or all of a smaller
            weight.
        seed: the seed of the places, at least 0.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range.
    """

    on_stacks: ClassVar[bool] = True
    kind: ClassVar[type[DeltaModule]] = SHiRADelta
    design: ClassVar[Design] = Design(form="S x, S sparse")

    r: int | None = None
    seed: int = 0

    def validate(self) -> None:
        if self.r is not None and self.r < 1:
            raise OptionError(f"SHiRA(r={self.r}): expected a rank of at least 1; {_USUAL} is usual")
        check_seed("SHiRA", self.seed, None)

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> "SHiRA":
        r, seed = next(part.options for part in parts if isinstance(part, SHiRADelta))
        return cls(r=r, seed=seed)
