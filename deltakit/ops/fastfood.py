"""Fastfood: fixed random projections of a short vector to a long one, in O(n log n) and without a matrix.

Le et al. 2013, https://arxiv.org/abs/1408.3060, section 3: blocks H G Π H B with random signs B, a permutation Π, normal
numbers G and the Walsh-Hadamard matrix H. Each block is as long as the short vector, filled up to a power of two, and as many
are stacked as the long vector needs. All of them, and those of all weights, read B and G of one draw at places of their own,
so that the draw takes the memory of one block. Drawn anew for each, it would take more memory than the backbone's weights.
"""

import zlib
from math import prod

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltakit.ops.seeded import Seeded, normal, permutation, signs

_SMALLEST = 2**14
"""The least length of a block. It has 2**28 pairs of places, so that two blocks of a backbone are hardly ever the same."""
_AT_ONCE = 32
"""The size of the Hadamard matrices that are multiplied: four products for a million features, where halving takes twenty."""


def hadamard(n: int, **like: object) -> Float[Tensor, "n n"]:
    """Returns the Walsh-Hadamard matrix of ones and minus ones. n: a power of two.

    >>> hadamard(2).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    row = torch.arange(n)
    ones = torch.zeros(n, n, dtype=torch.long)
    for bit in range(n.bit_length() - 1):
        ones += ((row[:, None] >> bit) & 1) * ((row >> bit) & 1)
    return (1 - 2.0 * (ones % 2)).to(**like)  # type: ignore[call-overload]


def walsh_hadamard(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Returns H x, unnormalised. n: a power of two.

    Products and reshapes only, so that autograd's gradient is H g. The copies of this transform by the authors of SAID and of
    Compacter divide it by √n, so their gradient is too small by √n for each transform.
    """
    n, done = x.shape[-1], 1
    while done < n:
        size = min(_AT_ONCE, n // done)
        matrix = hadamard(size, dtype=x.dtype, device=x.device)
        if done == 1:
            # H is symmetric, and as the left factor it would make products with columns of one number.
            x = (x.reshape(*x.shape[:-1], -1, size) @ matrix).reshape(x.shape)
        else:
            x = (matrix @ x.reshape(*x.shape[:-1], -1, size, done)).reshape(x.shape)
        done *= size
    return x


class Fastfood(nn.Module):
    """Projections of vectors [size] to tensors of any shape, from one seed. They keep norms: ‖P x‖ is ‖x‖ up to chance.

    Each tensor has a projection of its own, which depends on the seed, on its key, and on nothing else.

    Args:
        seed: a number from 0 to 2**31 - 1.
    """

    def __init__(self, size: int, seed: int, device: torch.device) -> None:
        super().__init__()
        n = max(_SMALLEST, 1 << (size - 1).bit_length())
        recipes = {
            "signs": ((n,), signs(), torch.int8),
            "order": ((n,), permutation(), torch.int64),
            # Rounded, so that the projection is the same in every dtype.
            "normal": ((n,), normal(), torch.bfloat16),
        }
        self.n, self.seed = n, seed
        self.draw = Seeded(seed, recipes, device=device)

    def forward(self, x: Float[Tensor, " size"], key: int, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
        """Returns the projection of x, in float32 or wider, that belongs to a key.

        Args:
            key: what `key_of_name` returned.
            shape: the shape of the result.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        length = prod(shape)
        blocks = torch.arange(-(-length // self.n), device=x.device)
        mixed = _mixed(_mixed(blocks.new_full((), key + (self.seed << 32))) + blocks)
        signs, numbers = self.draw.get_buffer("signs").to(x.dtype), self.draw.get_buffer("normal").to(x.dtype)
        full = torch.cat([x, x.new_zeros(self.n - len(x))])
        z = walsh_hadamard(full * self._rolled(signs, mixed % self.n)).index_select(1, self.draw.get_buffer("order"))
        found = walsh_hadamard(z * self._rolled(numbers, (mixed >> 32) % self.n)).flatten()[:length]
        return (found / (length * numbers.square().sum()).sqrt()).view(shape)

    def _rolled(self, values: Float[Tensor, " n"], at: Int64[Tensor, " blocks"]) -> Float[Tensor, "blocks n"]:
        return torch.cat([values, values]).unfold(0, self.n, 1)[at]


def key_of_name(name: str) -> int:
    """Returns a number below 2**32 for a name."""
    return zlib.crc32(name.encode())


def _mixed(numbers: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Returns numbers that look random: the last steps of MurmurHash3. Unlike a generator, they can be compiled."""
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        numbers = (numbers ^ ((numbers >> 33) & 0x7FFFFFFF)) * factor
    return numbers ^ ((numbers >> 33) & 0x7FFFFFFF)
