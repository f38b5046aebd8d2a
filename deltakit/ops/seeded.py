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


def signs() -> Draw:
    """Returns a function that draws -1 and 1."""
    return _signs


def permutation() -> Draw:
    """Returns a function that draws the numbers from 0 on in a random order: below 2**24, beyond which float32 has gaps."""
    return _permutation


def _signs(values: Float[Tensor, "*shape"], generator: torch.Generator) -> None:
    values.bernoulli_(generator=generator).mul_(2).sub_(1)


def _permutation(values: Float[Tensor, " n"], generator: torch.Generator) -> None:
    values.copy_(torch.randperm(len(values), generator=generator))


def _draw(how: str, first: float, second: float, values: Float[Tensor, "*shape"], generator: torch.Generator) -> None:
    getattr(values, how)(first, second, generator=generator)


def seeded(shape: tuple[int, ...], seed: int, draw: Draw) -> Float[Tensor, "*shape"]:
    """Returns the values of one seed, in float32 on the CPU. The global random state is neither read nor changed.

    >>> torch.equal(seeded((2, 3), 1, normal()), seeded((2, 3), 1, normal()))
    True
    """
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    draw(values, torch.Generator("cpu").manual_seed(seed))
    return values


class Seeded(nn.Module):
    """Several frozen tensors of one seed, as buffers that are not saved.

    On the meta device they have no values. When `to_empty` moves them to another device, they are drawn.

    Args:
        recipes: by the name of each tensor its shape, what draws it, and optionally a dtype of its own.
        like: the device and the dtype of the others.
    """

    def __init__(self, seed: int, recipes: Mapping[str, tuple[Any, ...]], **like: Any) -> None:
        super().__init__()
        self.seed, self.recipes = seed, recipes
        for name, (shape, _, *dtype) in recipes.items():
            own = {**like, "dtype": dtype[0]} if dtype else like
            self.register_buffer(name, torch.empty(shape, **own), persistent=False)
        self._fill()

    def _fill(self) -> None:
        for index, (name, (shape, draw, *_)) in enumerate(self.recipes.items()):
            buffer = self._buffers[name]
            if buffer is not None and not buffer.is_meta:
                # Each tensor has its own seed, so its values do not depend on the sizes of the others.
                buffer.copy_(seeded(shape, self.seed + index, draw))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Seeded":
        before = self._kinds()
        super()._apply(fn, recurse)
        # Another dtype gets the numbers themselves, and not what an earlier one left of them.
        if before != self._kinds():
            self._fill()
        return self

    def _kinds(self) -> list[tuple[torch.dtype, bool]]:
        return [(buffer.dtype, buffer.is_meta) for buffer in self._buffers.values() if buffer is not None]
