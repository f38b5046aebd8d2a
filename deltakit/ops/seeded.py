"""Frozen tensors that come from a seed instead of a file (VeRA's projections, RandLoRA's bases).

They are drawn on the CPU in float32, so that every device and dtype sees the same numbers, and are in no state dict.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Draw = Callable[[Tensor, torch.Generator], Any]


def uniform(bound: float) -> Draw:
    """Draws from the uniform distribution within `bound` of 0."""
    # A partial and no closure: modules that hold one can be pickled.
    return partial(_draw, "uniform_", -bound, bound)


def normal(std: float = 1.0) -> Draw:
    """Draws from the normal distribution around 0."""
    return partial(_draw, "normal_", 0.0, std)


def _draw(how: str, first: float, second: float, values: Tensor, generator: torch.Generator) -> None:
    getattr(values, how)(first, second, generator=generator)


def seeded(shape: tuple[int, ...], seed: int, draw: Draw) -> Float[Tensor, "..."]:
    """The values of one seed, in float32 on the CPU. The global random state is neither read nor changed.

    >>> torch.equal(seeded((2, 3), 1, normal()), seeded((2, 3), 1, normal()))
    True
    """
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    draw(values, torch.Generator("cpu").manual_seed(seed))
    return values


class Seeded(nn.Module):
    """Several frozen tensors of one seed, as buffers that no file holds. Of tensors that are shared, the delta holds one.

    A module on the meta device has no values. When it gets some (`to_empty`), they are drawn anew.
    """

    def __init__(self, seed: int, recipes: dict[str, tuple[tuple[int, ...], Draw]], **like: Any) -> None:
        super().__init__()
        self.seed, self.recipes = seed, recipes
        for name, (shape, _) in recipes.items():
            self.register_buffer(name, torch.empty(shape, **like), persistent=False)
        self._fill()

    def _fill(self) -> None:
        for place, (name, (shape, draw)) in enumerate(self.recipes.items()):
            buffer = self._buffers[name]
            if buffer is not None and not buffer.is_meta:
                # Each tensor has a seed of its own: so another set of targets reads the same numbers.
                buffer.copy_(seeded(shape, self.seed + place, draw))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Seeded":
        before = self._kinds()
        super()._apply(fn, recurse)
        # Another dtype gets the numbers themselves, and not what an earlier one left of them.
        if before != self._kinds():
            self._fill()
        return self

    def _kinds(self) -> list[tuple[torch.dtype, bool]]:
        return [(buffer.dtype, buffer.is_meta) for buffer in self._buffers.values() if buffer is not None]
