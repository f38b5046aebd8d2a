"""Attention over a prefix: K' = [P_k; K], V' = [P_v; V], and a mask in which every query sees the prefix."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.errors import StateError
from deltakit.method import DeltaModule


class AttentionPrefix(DeltaModule):
    """What a prefix offers to the attention module that it is a child of."""

    def key_value(self) -> tuple[Float[Tensor, "heads prefix d_k"], Float[Tensor, "heads prefix d_v"]]:
        """The keys and values that every query sees before the module's own."""
        raise NotImplementedError(f"{type(self).__name__} does not override key_value")


def live_prefixes(module: nn.Module) -> list[AttentionPrefix]:
    """The prefixes on an attention module that take part in forwards."""
    return [child for child in module._modules.values() if isinstance(child, AttentionPrefix) and child.live]


def joined(prefixes: Sequence[AttentionPrefix]) -> tuple[Tensor, Tensor]:
    """The keys and values of several prefixes, one after the other in the order in which they were attached."""
    pairs = [prefix.key_value() for prefix in prefixes]
    return torch.cat([key for key, _ in pairs], dim=1), torch.cat([value for _, value in pairs], dim=1)


def prepend(
    prefix: Float[Tensor, "heads prefix d"], own: Float[Tensor, "*batch seq d"], module: nn.Module
) -> Float[Tensor, "*batch both d"]:
    """The module's own keys or values with the prefix in front of them.

    `own` is [batch, heads, seq, d] or, as `torch.bmm` takes it, [batch * heads, seq, d]; its heads may be the prefix's
    repeated for groups of queries.

    Raises:
        StateError: if the sizes of the prefix do not fit.
    """
    heads, length, d = prefix.shape
    many = own.shape[-3]
    flat = own.ndim == 3
    if own.shape[-1] != d or many % heads:
        raise StateError(
            f"{type(module).__name__}: a prefix for {heads} heads of {d} met keys or values of shape {tuple(own.shape)}; "
            "this attention does not work with the sizes that its attributes say"
        )
    if flat:
        front = prefix.repeat(many // heads, 1, 1)
    else:
        repeated = prefix.repeat_interleave(many // heads, dim=0) if many != heads else prefix
        front = repeated.expand(*own.shape[:-3], many, length, d)
    return torch.cat([front.to(own.dtype), own], dim=-2)


def widen(mask: Tensor, length: int, *, visible: bool = True) -> Tensor:
    """A mask or bias with `length` columns in front in which everything is seen: True, or 1 in a mask of integers; or 0.

    `visible=False`: for masks in which True means hidden.
    """
    if mask.dtype is torch.bool:
        return F.pad(mask, (length, 0), value=visible)
    return F.pad(mask, (length, 0), value=0 if mask.is_floating_point() else 1)


def causal(queries: int, keys: int, length: int, device: torch.device) -> Tensor:
    """The mask [queries, prefix + keys] in which the query i sees the prefix and the keys up to i."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    return widen(seen, length)
