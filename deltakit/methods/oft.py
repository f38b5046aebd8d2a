"""OFT: orthogonal finetuning, y = W R x with a block-diagonal rotation R.

Qiu et al. 2023, https://arxiv.org/abs/2306.07280, section 3. Each block is Cayley's R = (I + Q)(I - Q)^-1 of a skew-symmetric
matrix Q, which is zero at the start. Only the input is turned, so the weight is never read (Qiu et al. 2025,
https://arxiv.org/abs/2506.19847, section 3). There the inverse is a short series, I + Q + Q^2 + ..., which needs no solver,
but with it R is not quite orthogonal.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BareLayer, DeltaModule, Design, Method, Target, wide
from deltakit.errors import OptionError
from deltakit.ops import INPUTS_OF_QUERIES_AND_VALUES, InputMap, block_size_for, like


class OFTDelta(InputMap):
    """Turns its target's input, in blocks. `skew` [blocks, b (b - 1) / 2] holds Q above its diagonal, row by row."""

    def __init__(self, target: Target, options: "OFT") -> None:
        super().__init__(target)
        given = options.block_size
        if options.blocks is not None:
            given = self.size // block_size_for(target, "OFT(blocks", options.blocks, 1, self.size)
        self.block_size = b = block_size_for(target, "OFT(block_size", given, 32, self.size, least=2)
        self.terms = options.terms if options.cayley == "neumann" else 0
        blocks = 1 if options.block_share else self.size // b
        self.skew = nn.Parameter(torch.zeros(blocks, b * (b - 1) // 2, **like(target)))

    def turn(self) -> Float[Tensor, "blocks b b"]:
        """Returns R - I, in float32 or wider. So small angles are not rounded off, and angles of zero are exactly a no-op."""
        skew, b = wide(self.skew), self.block_size
        rows, columns = torch.triu_indices(b, b, 1, device=skew.device)
        q = skew.new_zeros(len(skew), b, b).index_put(
            (torch.arange(len(skew), device=skew.device)[:, None], rows, columns), skew
        )
        q = q - q.mT
        if not self.terms:
            # (I + Q)(I - Q)^-1 - I = 2 Q (I - Q)^-1
            return torch.linalg.solve(torch.eye(b, dtype=q.dtype, device=q.device) - q, 2 * q, left=False)
        # (I + Q)(I + Q + ... + Q^(terms - 2)) - I = 2 Q + 2 Q^2 + ... + 2 Q^(terms - 2) + Q^(terms - 1)
        found, power = 2 * q, q
        for _ in range(self.terms - 3):
            power = power @ q
            found = found + 2 * power
        return found + power @ q

    def into(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        turn = self.turn().to(x.dtype).expand(self.size // self.block_size, -1, -1)
        return x + torch.einsum("...nb,ncb->...nc", x.unflatten(-1, turn.shape[:2]), turn).flatten(-2)

    def linear_update(self, layer: BareLayer) -> tuple[Tensor, None]:
        turn = self.turn().expand(self.size // self.block_size, -1, -1)
        # A convolution has one weight for each position in its kernel.
        weight = layer.weight.unflatten(-1, (*turn.shape[:2], -1))
        return torch.einsum("oncp,ncb->onbp", weight, turn.to(weight)).flatten(1), None

    def summary(self) -> str:
        shared = " shared" if len(self.skew) < self.size // self.block_size else ""
        return f"block_size={self.block_size}{shared}" + (f" terms={self.terms}" if self.terms else "")


@dataclass(frozen=True, kw_only=True)
class OFT(Method, name="oft"):
    """Orthogonal finetuning: trained rotations of the inputs of linear layers.

    Args:
        block_size: the size of the rotated blocks in features, at least 2; it divides their number. By default the largest
            such size up to 32, or the smallest one if all are larger.
        blocks: instead of `block_size`: the number of blocks.
        block_share: whether all blocks of a target are rotated alike.
        cayley: "exact" rotates exactly. "neumann" is a series for it, which is faster for large blocks.
        terms: the number of terms of the series, at least 4.

    Raises:
        OptionError: if an option is out of its range, or both `block_size` and `blocks` are given.
    """

    kind: ClassVar[type[DeltaModule]] = OFTDelta
    design: ClassVar[Design] = Design(form="R x, R block-diagonal and orthogonal")

    block_size: int | None = None
    blocks: int | None = None
    block_share: bool = False
    cayley: Literal["exact", "neumann"] = "exact"
    terms: int = 5

    def validate(self) -> None:
        if self.block_size is not None and self.blocks is not None:
            raise OptionError(f"OFT(block_size={self.block_size}, blocks={self.blocks}): omit one of the two")
        if self.block_size is not None and self.block_size < 2:
            raise OptionError(f"OFT(block_size={self.block_size}): expected at least 2 features; 32 is usual")
        if self.blocks is not None and self.blocks < 1:
            raise OptionError(f"OFT(blocks={self.blocks}): expected at least 1")
        if self.terms < 4:
            raise OptionError(f"OFT(terms={self.terms}): expected at least 4; 5 is usual")

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return INPUTS_OF_QUERIES_AND_VALUES

    def build_at(self, target: Target) -> DeltaModule:
        return OFTDelta(target, self)
