"""Starts of low-rank factors: the values of a random A beside a B of zeros (`kaiming_uniform`), and others for LoRA.

- PiSSA, Meng et al. 2024, https://arxiv.org/abs/2404.02948: the r largest singular values and vectors of the weight.
- OLoRA, Büyükakyüz 2024, https://arxiv.org/abs/2406.01775: the first r columns of Q and rows of R of its QR decomposition.
- MiCA, https://arxiv.org/abs/2604.01694: B has the left singular vectors of the r smallest singular values and is never
  trained; A is zero.
- orthogonal, https://datta0.github.io/posts/rethink-lora-init/: random factors whose inner sides are orthogonal.
- gaussian: A is normal with the deviation 1 / r, and B is zero, as in the text of LoRA's paper.

With PiSSA and OLoRA the product is not zero, so their authors subtract it from the weight. Here the backbone stays as it is:
the product of the start is subtracted from the update (`difference`).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import wide

STARTS_WITH_A_PRODUCT = ("pissa", "olora", "orthogonal")
"""Starts whose product is not zero, or only up to rounding."""


@torch.no_grad()
def start_factors(
    start: str,
    a: Float[Tensor, "*stack r d_in"],
    b: Float[Tensor, "*stack d_out r"],
    scaling: float,
    weight: Callable[[], Float[Tensor, "*stack d_out d_in"]],
) -> None:
    """Fills the factors A and B with the start values of that name.

    Args:
        scaling: the factor of the product; PiSSA divides by it.
        weight: returns the weight of the layer. It is called for the starts that are computed from the weight.
    """
    r = a.shape[-2]
    if start == "gaussian":
        nn.init.normal_(a, std=1 / r)
        nn.init.zeros_(b)
    elif start == "orthogonal":
        turn = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64, device="cpu"))[0].to(a)
        a.copy_(turn[0::2].mT @ torch.randn_like(a[..., : r // 2, :]) / 10)
        b.copy_(torch.randn_like(b[..., : r // 2]) @ turn[1::2] / 10)
    elif start == "olora":
        q, upper = torch.linalg.qr(wide(weight()))
        a.copy_(upper[..., :r, :])
        b.copy_(q[..., :r])
    else:
        u, values, v = torch.linalg.svd(wide(weight()), full_matrices=False)
        if start == "mica":
            nn.init.zeros_(a)
            b.copy_(u[..., -r:])
        else:
            root = (values[..., :r] / scaling).sqrt()
            a.copy_(root[..., None] * v[..., :r, :])
            b.copy_(u[..., :r] * root[..., None, :])


def difference(
    a: Float[Tensor, "*stack r d_in"],
    b: Float[Tensor, "*stack d_out r"],
    a0: Float[Tensor, "*stack r d_in"],
    b0: Float[Tensor, "*stack d_out r"],
) -> tuple[Float[Tensor, "*stack twice d_in"], Float[Tensor, "*stack d_out twice"]]:
    """Returns factors of B A - B0 A0, which are (B - B0) A + B0 (A - A0): exactly zero if nothing was trained.

    As B A - B0 A0 it would be zero only if both products are rounded alike, which a product of the joined factors is not.
    """
    return torch.cat([a, a - a0], dim=-2), torch.cat([b - b0, b0], dim=-1)


def kaiming_uniform(factor: Float[Tensor, "*stack r d_in"]) -> None:
    """Fills a factor A as nn.Linear fills its weight: uniform within 1 / sqrt(d_in) of 0."""
    bound = 1 / math.sqrt(factor.shape[-1])
    nn.init.uniform_(factor, -bound, bound)
