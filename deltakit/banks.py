"""Many low-rank deltas at one layer, each for its own rows of a batch: their factors side by side, in two batched products.

The cost does not grow with the number of deltas (a loop over them, or a grouped product, does; measured).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deltakit.batches import Batch


def gathered(
    factors: Sequence[tuple[Tensor, Tensor]], index: Sequence[int], x: Tensor
) -> tuple[Float[Tensor, "names r d_in"], Float[Tensor, "names r d_out"]]:
    """The factors of each row of the batch, with zeros up to the largest rank and for rows without a delta."""
    rank = max(a.shape[0] for a, _ in factors)
    low = torch.stack([F.pad(a.to(x.dtype), (0, 0, 0, rank - a.shape[0])) for a, _ in factors])
    high = torch.stack([F.pad(b.to(x.dtype).mT, (0, 0, 0, rank - b.shape[1])) for _, b in factors])
    if -1 in index:
        low, high = (torch.cat([part, torch.zeros_like(part[:1])]) for part in (low, high))
    places = torch.tensor([len(factors) if i < 0 else i for i in index], device=x.device)
    return low.index_select(0, places), high.index_select(0, places)


def add_gathered(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *, in_place: bool) -> Tensor:
    """y with the product of gathered factors added."""
    rows = x.reshape(a.shape[0], -1, x.shape[-1])
    out = y.reshape(a.shape[0], -1, y.shape[-1])
    h = torch.bmm(rows, a.mT)
    return (out.baddbmm_(h, b) if in_place else torch.baddbmm(out, h, b)).view(y.shape)


def kept_or_made(batch: Batch, key: Any, parameters: Sequence[Tensor], make: Any) -> Any:
    """What `make` gives, made again only when a parameter changed; with gradients always, for they go through it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
        return make()
    state = tuple((id(parameter), parameter._version) for parameter in parameters)
    found = batch.kept.get(key)
    if found is None or found[0] != state:
        found = batch.kept[key] = (state, make())
    return found[1]
