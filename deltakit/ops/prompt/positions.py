"""Moves the positions of a text behind those of a prefix, where `past_key_values` would move them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltakit.errors import StateError
from deltakit.ops.kinds.call_context import CallContext
from deltakit.ops.prompt.cache import stored_length
from deltakit.ops.prompt.text_stack import Positions, names_of_arguments


def move_positions(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    by: int | Int64[Tensor, "examples 1"],
    counted: Positions,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a text stack's call with positions that start after a prefix.

    Args:
        by: the length of the prefix in tokens, or one for each example.
        counted: how the stack counts positions if it is given none.

    Raises:
        StateError: if the call has neither positions nor tokens to count.
    """
    call = {**dict(zip(names_of_arguments(module), args, strict=False)), **kwargs}
    given = call.get("position_ids")
    if isinstance(given, Tensor):
        return (), {**call, "position_ids": given + by}
    ids, vectors = call.get("input_ids"), call.get("inputs_embeds")
    text = ids if isinstance(ids, Tensor) else vectors
    if not isinstance(text, Tensor):
        raise StateError(
            f"{type(module).__name__}: a prefix moves the positions of the text, and this call has no input_ids; pass "
            "position_ids, or attach Prefix(shift=False)"
        )
    start = stored_length(call)
    positions = torch.arange(start, start + text.shape[1], device=text.device)[None] + by
    if counted == "padding":
        # RoBERTa counts from its padding id on, and gives padding the position of that id.
        padding = int(module.config.pad_token_id)  # type: ignore[union-attr, arg-type]
        if isinstance(ids, Tensor):
            seen = (ids != padding).long()
            positions = (seen.cumsum(1) + start + by) * seen + padding
        else:
            positions = positions + padding + 1
    return (), {**call, "position_ids": positions.expand(text.shape[0], -1)}


class PositionsDelta(CallContext):
    """Lets the positions of the text start after the prefix, in the module that turns token ids into hidden states."""

    mixable: ClassVar[bool] = True

    def __init__(self, tokens: int, counted: Positions) -> None:
        super().__init__()
        self.tokens, self.counted = tokens, counted

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch, peers = self.batch, self.peers(target)
        if batch is None:
            return move_positions(target, args, kwargs, sum(peer.tokens for peer in peers), self.counted)
        text = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        own = {peer.record.name: peer.tokens for peer in peers}
        by = torch.tensor([[own.get(name, 0)] for name in batch.names], device=text.device)
        by = by.repeat_interleave(batch.times(text.flatten(1)[..., None], target), 0)
        return move_positions(target, args, kwargs, by, self.counted)

    def summary(self) -> str:
        return f"shift={self.tokens}"
