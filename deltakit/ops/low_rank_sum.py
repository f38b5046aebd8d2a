"""Sums of low-rank products as one product: exact, or the best approximation of a given rank."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def sum_of_products(
    parts: Sequence[tuple[float, Tensor, Tensor]], like: Float[Tensor, "*stack r d_in"]
) -> tuple[Float[Tensor, "*stack r d_in"], Float[Tensor, "*stack d_out r"], float, float]:
    """Returns the factors A and B of the sum of w_k B_k A_k, in the rank of `like`, and two squared Frobenius norms.

    Args:
        parts: w_k, A_k [*stack, r_k, d_in] and B_k [*stack, d_out, r_k].
        like: gives the rank r; its values are not read.

    Returns:
        A, B, the squared norm of the truncation error, and the squared norm of the sum.

    >>> one = (1.0, torch.eye(3)[:1], torch.eye(3)[:, :1])
    >>> a, b, lost, whole = sum_of_products([one, one], torch.empty(1, 3))
    >>> (b @ a)[0].float().tolist(), round(lost, 6), round(whole, 6)
    ([2.0, 0.0, 0.0], 0.0, 4.0)
    """
    rank = like.shape[-2]
    a = torch.cat([low.double() for _, low, _ in parts], dim=-2)
    b = torch.cat([weight * high.double() for weight, _, high in parts], dim=-1)
    # B A = Q_b (R_b R_a^T) Q_a^T: the small matrix in the middle has all the singular values.
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, values, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    total, lost = values.square().sum(), values[..., rank:].square().sum()
    more = rank - a.shape[-2]
    if more >= 0:
        return F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more)), 0.0, float(total)
    root = values[..., :rank].sqrt()
    low = root[..., None] * (v[..., :rank, :] @ q_a.mT)
    return low, q_b @ u[..., :rank] * root[..., None, :], float(lost), float(total)
