"""C3A: a block-circulant weight update.  Chen et al. 2024, https://arxiv.org/abs/2407.19342, section 3.

y_i = y_i + (sum over j of the circular correlation of x_j and w_ij) / d_in, for blocks x_j of the input and y_i of the output.
It is computed by Fourier transforms, so the matrix is never built. The authors' code starts with random kernels, which change
the outputs. Here they start at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import BareLayer, DeltaModule, Design, Method, Target, linear_sizes, wide
from deltakit.errors import OptionError, TargetError
from deltakit.ops import QUERIES_AND_VALUES, OutputMap, block_size_for, like, recomputed, take_weighted_sum


class C3ADelta(OutputMap):
    """The kernels `kernel` [d_out / b, d_in / b, b]. They start at zero."""

    def __init__(self, target: Target, block_size: int | None) -> None:
        super().__init__(target)
        linear = linear_sizes(target.module)
        if linear is None:
            raise TargetError(
                f"{target.named}: C3A works on linear layers, found {type(target.module).__name__}; leave it out with of= or "
                "exclude="
            )
        self.block_size = b = block_size_for(target, "C3A(block_size", block_size, 256, linear[0], self.size)
        self.kernel = nn.Parameter(torch.zeros(self.size // b, linear[0] // b, b, **like(target)))

    def forward(self, x: Shaped[Tensor, "*batch d_in"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if not torch.jit.is_tracing() and not x.numel():  # type: ignore[attr-defined]
            # MKL has no transforms of an empty tensor. The kernel gets a gradient of zeros, as weights do.
            return y + 0 * self.kernel.sum().to(y.dtype)
        # The transforms are twice as large as x. They are computed again in the backward pass.
        new = recomputed(self._product, x, self.kernel)
        return y + new.to(y.dtype)

    def _product(
        self, x: Float[Tensor, "*batch d_in"], kernel: Float[Tensor, "blocks_out blocks_in b"]
    ) -> Float[Tensor, "*batch d"]:
        # torch has no transforms of 16 bits.
        blocks = torch.fft.rfft(wide(x).unflatten(-1, (-1, self.block_size)))
        kernels = torch.fft.rfft(wide(kernel)).conj()
        product = torch.einsum("...nf,mnf->...mf", blocks, kernels)
        return torch.fft.irfft(product, n=self.block_size).flatten(-2) / x.shape[-1]

    def linear_update(self, layer: BareLayer) -> tuple[Tensor, None]:
        b, place = self.block_size, torch.arange(self.block_size, device=self.kernel.device)
        # The weight from input i to output j of a block is that of their distance.
        blocks = wide(self.kernel)[..., (place - place[:, None]) % b]
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1) / (self.kernel.shape[1] * b), None

    def take_sum(self, parts: Sequence[tuple[float, DeltaModule]]) -> tuple[float, float]:
        return take_weighted_sum(self, "kernel", parts)

    def summary(self) -> str:
        return f"block_size={self.block_size}"


@dataclass(frozen=True, kw_only=True)
class C3A(Method, name="c3a"):
    """Block-circulant updates of linear layers.

    Args:
        block_size: the size of the blocks in features; it divides the numbers of inputs and outputs. By default the largest
            such size up to 256. Larger blocks have fewer parameters.

    Raises:
        OptionError: if `block_size` is below 1.
    """

    kind: ClassVar[type[DeltaModule]] = C3ADelta
    design: ClassVar[Design] = Design(form="C x, C block-circulant", insertion="parallel", composition="addition")

    block_size: int | None = None

    def validate(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise OptionError(f"C3A(block_size={self.block_size}): expected at least 1 feature; 256 is usual")

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return QUERIES_AND_VALUES

    def build_at(self, target: Target) -> DeltaModule:
        return C3ADelta(target, self.block_size)

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> "C3A":
        sizes = sorted({part.block_size for part in parts if isinstance(part, C3ADelta)})
        if len(sizes) > 1:
            raise TargetError(f"C3A has sums of one block size only, found {sizes}; run the deltas one by one")
        return cls(block_size=sizes[0])
