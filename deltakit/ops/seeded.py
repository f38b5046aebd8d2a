"""Frozen random tensors and places that are computed from a seed instead of saved (VeRA's projections, FourierFT's entries).

They are drawn on the CPU in float32, so they are the same on every device and in every dtype. They are in no state dict.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
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
    return _drawn(shape, torch.Generator("cpu").manual_seed(seed), draw)


def _drawn(shape: tuple[int, ...], generator: torch.Generator, draw: Draw) -> Float[Tensor, "*shape"]:
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    draw(values, generator)
    return values


class Seeded(nn.Module):
    """Several frozen tensors of one seed, as buffers that are not saved.

    On the meta device they have no values. When `to_empty` moves them to another device, they are drawn.

    Args:
        recipes: by the name of each tensor its shape, what draws its values, and optionally a dtype of its own.
        one_stream: draw them all from one generator, in their order, as PEFT does. By default each has its own seed, so that
            its values do not depend on the sizes of the others.
        like: the device and the dtype of the others.
    """

    def __init__(
        self, seed: int, recipes: Mapping[str, tuple[Any, ...]], *, one_stream: bool = False, **like: Any
    ) -> None:
        super().__init__()
        self.seed, self.recipes, self.one_stream = seed, recipes, one_stream
        for name, (shape, _, *dtype) in recipes.items():
            own = {**like, "dtype": dtype[0]} if dtype else like
            self.register_buffer(name, torch.empty(shape, **own), persistent=False)
        self._fill()

    def _fill(self) -> None:
        if any(buffer is None or buffer.is_meta for buffer in self._buffers.values()):
            return
        for name, values in self.drawn():
            self.get_buffer(name).copy_(values)

    def drawn(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each tensor's name and its values in float32 on the CPU, also where the buffers have none."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        for index, (name, (shape, draw, *_)) in enumerate(self.recipes.items()):
            if not self.one_stream:
                generator.manual_seed(self.seed + index)
            yield name, _drawn(shape, generator, draw)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Seeded":
        before = self._kinds()
        super()._apply(fn, recurse)
        # Another dtype gets the numbers themselves, and not what an earlier one left of them.
        if before != self._kinds():
            self._fill()
        return self

    def _kinds(self) -> list[tuple[torch.dtype, bool]]:
        return [(buffer.dtype, buffer.is_meta) for buffer in self._buffers.values() if buffer is not None]


@lru_cache(8)
def seeded_places(size: int, count: int, seed: int) -> Int[Tensor, " count"]:
    """Returns the first `count` numbers of the random permutation of 0 to size - 1 that the seed gives, on the CPU.

    Layers of one size have the same places, and a permutation of all entries of a weight takes long. Do not change the result.
    """
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed))[:count].clone()


class SeededPlaces(nn.Module):
    """Different entries of a weight, chosen by a seed, as the buffer `index` [count], which is not saved."""

    index: Tensor

    def __init__(self, size: int, count: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self.recipe = size, count, seed
        self.register_buffer("index", seeded_places(*self.recipe).to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SeededPlaces":
        super()._apply(fn, recurse)
        if not self.index.is_meta:
            # `to_empty` leaves other numbers in it.
            self.index.copy_(seeded_places(*self.recipe))
        return self
