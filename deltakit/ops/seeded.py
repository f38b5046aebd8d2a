"""Frozen random tensors that are computed from a seed instead of saved (VeRA's projections, RandLoRA's bases).

They are drawn on the CPU in float32, so they are the same on every device and in every dtype. They are in no state dict.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Draw = Callable[[Tensor, torch.Generator], Any]


def uniform(bound: float) -> Draw:
    """Returns a function that draws from the uniform distribution within `bound` of 0."""
    # A partial instead of a closure, so that modules with it can be pickled.
    return partial(_draw, "uniform_", -bound, bound)


def normal(std: float = 1.0) -> Draw:
    """Returns a function that draws from the normal distribution around 0."""
    return partial(_draw, "normal_", 0.0, std)


def _draw(how: str, first: float, second: float, values: Float[Tensor, "*shape"], generator: torch.Generator) -> None:
    getattr(values, how)(first, second, generator=generator)


def seeded(shape: tuple[int, ...], seed: int, draw: Draw) -> Float[Tensor, "*shape"]:
    """Returns the values of one seed, in float32 on the CPU. The global random state is neither read nor changed.

    >>> torch.equal(seeded((2, 3), 1, normal()), seeded((2, 3), 1, normal()))
    True
    """
    return _drawn(shape, torch.Generator("cpu").manual_seed(seed), draw)


def _drawn(shape: tuple[int, ...], generator: torch.Generator, draw: Draw) -> Float[Tensor, "*shape"]:
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    draw(values, generator)
    return values


class Seeded(nn.Module):
    """Several frozen tensors of one seed, as buffers that are not saved.

    On the meta device they have no values. When `to_empty` moves them to another device, they are drawn.

    Args:
        recipes: the shape of each tensor, and what draws its values.
        one_stream: draw them all from one generator, in their order, as PEFT does. By default each has its own seed, so that
            its values do not depend on the sizes of the others.
    """

    def __init__(
        self, seed: int, recipes: Mapping[str, tuple[tuple[int, ...], Draw]], *, one_stream: bool = False, **like: Any
    ) -> None:
        super().__init__()
        self.seed, self.recipes, self.one_stream = seed, recipes, one_stream
        for name, (shape, _) in recipes.items():
            self.register_buffer(name, torch.empty(shape, **like), persistent=False)
        self._fill()

    def _fill(self) -> None:
        if any(buffer is None or buffer.is_meta for buffer in self._buffers.values()):
            return
        generator = torch.Generator("cpu").manual_seed(self.seed)
        for index, (name, (shape, draw)) in enumerate(self.recipes.items()):
            if not self.one_stream:
                generator.manual_seed(self.seed + index)
            self.get_buffer(name).copy_(_drawn(shape, generator, draw))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Seeded":
        before = self._kinds()
        super()._apply(fn, recurse)
        # Another dtype gets the numbers themselves, and not what an earlier one left of them.
        if before != self._kinds():
            self._fill()
        return self

    def _kinds(self) -> list[tuple[torch.dtype, bool]]:
        return [(buffer.dtype, buffer.is_meta) for buffer in self._buffers.values() if buffer is not None]
