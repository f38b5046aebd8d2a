"""Attention over a prefix: K' = [P_k; K], V' = [P_v; V], and a mask in which every query sees the prefix."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltakit.core import MixedBatch
from deltakit.errors import StateError
from deltakit.ops.kinds.call_context import CallContext


class AttentionPrefix(CallContext):
    """What a prefix offers to the attention module that it is a child of."""

    mixable: ClassVar[bool] = True

    def key_value(self) -> tuple[Float[Tensor, "heads prefix d_k"], Float[Tensor, "heads prefix d_v"]]:
        """The keys and values that every query sees before the module's own."""
        raise NotImplementedError(f"{type(self).__name__} does not override key_value")


def live_prefixes(module: nn.Module) -> list[AttentionPrefix]:
    """The prefixes on an attention module that take part in forwards."""
    prefixes = [child for child in module._modules.values() if isinstance(child, AttentionPrefix) and child.live]
    return [prefix for prefix in prefixes if prefix.takes_part]


def joined(prefixes: Sequence[AttentionPrefix]) -> tuple[Tensor, Tensor]:
    """The keys and values of several prefixes, one after the other in the order in which they were attached."""
    pairs = [prefix.key_value() for prefix in prefixes]
    return torch.cat([key for key, _ in pairs], dim=1), torch.cat([value for _, value in pairs], dim=1)


def joined_per_example(
    prefixes: Sequence[AttentionPrefix], batch: MixedBatch, times: int
) -> tuple[Float[Tensor, "rows heads prefix d_k"], Float[Tensor, "rows heads prefix d_v"], Bool[Tensor, "rows prefix"]]:
    """Each row's own keys and values, with zeros up to the longest prefix, and which of them a row sees.

    `times`: how many rows stand for each name of the batch.
    """
    own = {
        name: [p for p in prefixes if p.record is not None and p.record.name == name]
        for name in dict.fromkeys(batch.names)
        if name
    }
    pairs = {name: joined(mine) for name, mine in own.items() if mine}
    longest = max(key.shape[1] for key, _ in pairs.values())
    some_key, some_value = next(iter(pairs.values()))
    empty = some_key[:, :0], some_value[:, :0]
    lengths = [pairs.get(name or "", empty)[0].shape[1] for name in batch.names]
    parts = [
        torch.stack([_padded(pairs.get(name or "", empty)[place], longest) for name in batch.names]) for place in (0, 1)
    ]
    seen = torch.arange(longest, device=some_key.device) < torch.tensor(lengths, device=some_key.device)[:, None]
    key, value, seen = (part.repeat_interleave(times, 0) if times > 1 else part for part in (*parts, seen))
    return key, value, seen


def _padded(part: Tensor, length: int) -> Tensor:
    return F.pad(part, (0, 0, 0, length - part.shape[1]))


def widen_per_example(mask: Tensor, seen: Bool[Tensor, "rows prefix"]) -> Tensor:
    """A mask [rows or 1, heads or 1, queries, keys] with columns in front in which each row sees its own prefix."""
    sizes = (seen.shape[0], *mask.shape[1:-1], seen.shape[1])
    front = seen[:, None, None].expand(sizes)
    if mask.dtype is not torch.bool:
        front = torch.zeros(sizes, dtype=mask.dtype, device=mask.device).masked_fill(
            ~front, torch.finfo(mask.dtype).min
        )
    return torch.cat([front, mask.expand(seen.shape[0], *mask.shape[1:])], dim=-1)


def prepend(
    prefix: Float[Tensor, "*rows heads prefix d"], own: Float[Tensor, "*batch seq d"], module: nn.Module
) -> Float[Tensor, "*batch both d"]:
    """The module's own keys or values with the prefix in front of them.

    `own` is [batch, heads, seq, d] or, as `torch.bmm` takes it, [batch * heads, seq, d]; its heads may be the prefix's
    repeated for groups of queries.

    Raises:
        StateError: if the sizes of the prefix do not fit.
    """
    if prefix.ndim == 4:
        return _prepend_per_example(prefix, own, module)
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


def _prepend_per_example(prefix: Tensor, own: Tensor, module: nn.Module) -> Tensor:
    rows, heads = prefix.shape[:2]
    many = own.shape[1] if own.ndim == 4 else own.shape[0] // rows
    fits = own.shape[0] == (rows if own.ndim == 4 else rows * many)
    if not fits or many % heads or own.shape[-1] != prefix.shape[-1]:
        raise StateError(
            f"{type(module).__name__}: prefixes by rows {tuple(prefix.shape)} met keys or values of shape {tuple(own.shape)}; "
            "expected [rows, heads, length, d], or rows and heads in one"
        )
    front = prefix.repeat_interleave(many // heads, 1) if many != heads else prefix
    return torch.cat([(front if own.ndim == 4 else front.flatten(0, 1)).to(own.dtype), own], dim=-2)


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
