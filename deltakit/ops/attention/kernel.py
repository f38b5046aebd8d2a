"""Attention over a prefix: K' = [P_k; K], V' = [P_v; V], with a mask in which every query sees the prefix.

Li and Liang 2021, https://arxiv.org/abs/2101.00190, section 4.2.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from deltakit.core import Design, MixedBatch
from deltakit.errors import StateError
from deltakit.ops.kinds.call_context import CallContext


class AttentionPrefix(CallContext):
    """The interface of a prefix to the attention module that is its parent."""

    # Table 1 of He et al. 2022: a prefix moves the output of attention towards the attention to the prefix alone.
    design: ClassVar[Design] = Design(
        form="softmax(q P_k^T) P_v", changes="attention", insertion="parallel", composition="gated addition"
    )
    mixable: ClassVar[bool] = True

    tokens: int
    """The length of the prefix."""

    def key_value(
        self,
    ) -> tuple[Float[Tensor, "*examples heads prefix d_k"], Float[Tensor, "*examples heads prefix d_v"]]:
        """Returns the keys and values that every query sees ahead of the module's own: one set, or one for each example."""
        raise NotImplementedError(f"{type(self).__name__} does not override key_value")


def live_prefixes(module: nn.Module) -> list[AttentionPrefix]:
    """Returns the prefixes on an attention module that take part in the current forward."""
    prefixes = [child for child in list(module._modules.values()) if isinstance(child, AttentionPrefix) and child.live]
    return [prefix for prefix in prefixes if prefix.takes_part]


def joined(
    prefixes: Sequence[AttentionPrefix],
) -> tuple[Float[Tensor, "*examples heads prefix d_k"], Float[Tensor, "*examples heads prefix d_v"]]:
    """Returns the keys and values of several prefixes, concatenated in the order in which they were attached.

    They are one set for all examples, or if one of the prefixes has a gate, one for each example.
    """
    pairs = [prefix.key_value() for prefix in prefixes]
    return _concatenated([key for key, _ in pairs]), _concatenated([value for _, value in pairs])


def _concatenated(parts: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
    examples = next((part.shape[:1] for part in parts if part.ndim == 4), None)
    if examples is not None:
        parts = [part if part.ndim == 4 else part.expand(*examples, *part.shape) for part in parts]
    return torch.cat(list(parts), dim=-2)


def joined_per_example(
    prefixes: Sequence[AttentionPrefix], batch: MixedBatch, times: int
) -> tuple[
    Float[Tensor, "examples heads prefix d_k"],
    Float[Tensor, "examples heads prefix d_v"],
    Bool[Tensor, "examples prefix"],
]:
    """Returns each example's own keys and values, padded with zeros to the longest prefix, and a mask of what it sees.

    Args:
        times: the number of consecutive examples for each name of the batch (beam search repeats them).
    """
    own = {
        name: [p for p in prefixes if p.record is not None and p.record.name == name]
        for name in dict.fromkeys(batch.names)
        if name
    }
    pairs = {name: joined(mine) for name, mine in own.items() if mine}
    some_key, some_value = next(iter(pairs.values()))
    empty = some_key[..., :0, :], some_value[..., :0, :]
    found = [pairs.get(name or "", empty) for name in batch.names for _ in range(times)]
    lengths = [key.shape[-2] for key, _ in found]
    longest = max(lengths)
    key, value = (
        torch.stack([_padded(pair[place], row, longest) for row, pair in enumerate(found)]) for place in (0, 1)
    )
    seen = torch.arange(longest, device=some_key.device) < torch.tensor(lengths, device=some_key.device)[:, None]
    return key, value, seen


def _padded(part: Float[Tensor, "*examples heads own d"], row: int, length: int) -> Float[Tensor, "heads prefix d"]:
    """Returns the keys or values of one example, with zeros behind them."""
    own = part if part.ndim == 3 else part[row]
    return F.pad(own, (0, 0, 0, length - own.shape[1]))


def widen_per_example(
    mask: Shaped[Tensor, "some some_heads queries keys"], seen: Bool[Tensor, "examples prefix"]
) -> Shaped[Tensor, "examples some_heads queries both"]:
    """Returns the mask with columns in front in which each example sees its own prefix.

    The first two dimensions of the mask may be 1.
    """
    sizes = (seen.shape[0], *mask.shape[1:-1], seen.shape[1])
    front = seen[:, None, None].expand(sizes)
    if mask.dtype is not torch.bool:
        front = torch.zeros(sizes, dtype=mask.dtype, device=mask.device).masked_fill(
            ~front, torch.finfo(mask.dtype).min
        )
    return torch.cat([front, mask.expand(seen.shape[0], *mask.shape[1:])], dim=-1)


def prepend(
    prefix: Float[Tensor, "*examples heads prefix d"], own: Float[Tensor, "*batch seq d"], module: nn.Module
) -> Float[Tensor, "*batch both d"]:
    """Returns the module's own keys or values with the prefix in front of them.

    Args:
        prefix: one for all examples, or one for each of them in the first dimension.
        own: [batch, heads, seq, d], or [batch * heads, seq, d] as `torch.bmm` takes it. It may have a multiple of the
            prefix's heads, because some models repeat keys for groups of queries before this call, others after it.

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
            f"{type(module).__name__}: a prefix for {heads} heads of size {d} does not fit keys or values of shape "
            f"{tuple(own.shape)}; this attention computes with other sizes than its attributes say: omit it with exclude="
        )
    if flat:
        # The first dimension is batch times heads, with heads varying fastest.
        front = prefix.repeat(many // heads, 1, 1)
    else:
        repeated = prefix.repeat_interleave(many // heads, dim=0) if many != heads else prefix
        front = repeated.expand(*own.shape[:-3], many, length, d)
    return torch.cat([front.to(own.dtype), own], dim=-2)


def _prepend_per_example(
    prefix: Float[Tensor, "examples heads prefix d"], own: Float[Tensor, "*batch seq d_own"], module: nn.Module
) -> Float[Tensor, "*batch both d_own"]:
    examples, heads = prefix.shape[:2]
    many = own.shape[1] if own.ndim == 4 else own.shape[0] // examples
    fits = own.shape[0] == (examples if own.ndim == 4 else examples * many)
    if not fits or many % heads or own.shape[-1] != prefix.shape[-1]:
        raise StateError(
            f"{type(module).__name__}: prefixes of shape {tuple(prefix.shape)} do not fit keys or values of shape "
            f"{tuple(own.shape)}: expected [examples, heads, length, d], or examples and heads in one dimension; omit this "
            "module with exclude="
        )
    front = prefix.repeat_interleave(many // heads, 1) if many != heads else prefix
    return torch.cat([(front if own.ndim == 4 else front.flatten(0, 1)).to(own.dtype), own], dim=-2)


def widen(
    mask: Shaped[Tensor, "*lead keys"],
    length: int,
    front: Float[Tensor, "*front_lead prefix"] | None = None,
    *,
    visible: bool = True,
) -> Shaped[Tensor, "*lead both"]:
    """Returns a mask or bias with `length` columns in front that hide nothing.

    These are True in a boolean mask, 1 in a mask of integers, and 0 in a mask or bias that is added to scores.

    Args:
        front: the columns, if they are others.
        visible: the value that means "seen" in a boolean mask; False for masks in which True means hidden.
    """
    if front is not None:
        return torch.cat([front.expand(*mask.shape[:-1], length), mask], dim=-1)
    if mask.dtype is torch.bool:
        return F.pad(mask, (length, 0), value=visible)
    return F.pad(mask, (length, 0), value=0 if mask.is_floating_point() else 1)


def causal(queries: int, keys: int, length: int, device: torch.device) -> Bool[Tensor, "queries both"]:
    """Returns the mask in which query i sees all `length` positions of the prefix and the keys up to i."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    return widen(seen, length)
