"""Relative positions in T5's first block only, as they are in OpenDelta's prefixes on T5.

T5's first block computes a bias for relative positions and hands it on to the other blocks. A block with OpenDelta's prefix
(`opendelta/delta_models/prefix.py`, August 2023) hands none on, so that the blocks behind it have none. In the first block,
OpenDelta's prefix has the relative positions of text that stands before the text. Both were seen in OpenDelta's own runs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import Target
from deltakit.errors import StateError, TargetError
from deltakit.ops.attention.kernel import AttentionPrefix, live_prefixes

# mT5 is T5 with other sizes. Models with the same attributes use them in other ways: UMT5 has relative positions of its own in
# each block, and UDOP computes them outside of its blocks.
_T5 = {"T5Attention", "MT5Attention"}

_TABLE = "relative_attention_bias"
"""The embedding of relative positions, which the first block has."""

FRONT = "prefix_position_bias"
"""The name under which the bias of the prefix goes from a call of T5's attention to the attention interface."""


def refuse_without_first_block(target: Target) -> None:
    """Raises an error for attention that has no relative positions as T5 has them.

    Raises:
        TargetError: if it is not T5's.
    """
    if not _T5 & {kind.__name__ for kind in type(target.module).__mro__}:
        raise TargetError(
            f"{target.named}: Prefix(relative_positions='first_block') expects the attention of T5 or mT5, and this is a "
            f"{type(target.module).__name__}; use relative_positions='all_blocks'"
        )


def first_block_only(
    prefix: AttentionPrefix, target: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Float[Tensor, "one heads queries prefix"] | None]:
    """Returns the keywords of a call of T5's attention without the bias from the block before, and the bias of a prefix.

    The bias is None where the attention computes none itself: outside of the first block, and in attention to the encoder.

    Raises:
        StateError: if another prefix takes part in the call.
    """
    if len(live_prefixes(target)) > 1:
        raise StateError(
            f"{type(target).__name__}: a Prefix(relative_positions='first_block') takes the relative positions from other "
            f"prefixes, too, and here is one beside that of delta {prefix.record.name if prefix.record else None!r}; make one "
            "of them inactive with `active = False`, or use dk.use(model, name)"
        )
    x = args[0] if args else kwargs["hidden_states"]
    bias = _bias(target, x, kwargs.get("past_key_values"), prefix.tokens) if hasattr(target, _TABLE) else None
    return {**kwargs, "position_bias": None}, bias


def _bias(
    attention: Any, x: Float[Tensor, "batch queries d"], cache: Any, tokens: int
) -> Float[Tensor, "one heads queries prefix"]:
    """Returns T5's bias between queries and a prefix that stands before the text."""
    start = 0 if cache is None else cache.get_seq_length(attention.layer_idx)
    queries = torch.arange(x.shape[1], device=x.device) + start
    prefix = torch.arange(-tokens, 0, device=x.device)
    buckets = attention._relative_position_bucket(
        prefix - queries[:, None],
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    bias: Tensor = getattr(attention, _TABLE)(buckets)
    return bias.permute(2, 0, 1)[None]


def nothing_handed_on(output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the output of T5's attention without the bias for the next block, which has none then."""
    return (output[0], None, *output[2:])
