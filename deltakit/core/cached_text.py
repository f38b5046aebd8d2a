"""The text of a call with a cache: the ids that the cache holds, and the new ones.

A step of `generate` gets the new ids alone. The ids of the steps before are noted on the cache itself, so that they follow its
copies and pickles, and its examples when beam search reorders or repeats them.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from deltakit.core.backbone_call import CurrentCall
from deltakit.errors import StateError

UNKNOWN = -1
"""Stands for the id of a token that was cached while nobody asked for the text."""

# An attribute of caches, and a key of `CurrentCall.kept`.
_TEXT = "_deltakit_text"
_REPEAT = "batch_repeat_interleave"
_MOVES = ("reorder_cache", "batch_select_indices", _REPEAT)


class MovesText:
    """A cache's own function that moves its examples, which moves their texts as well."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        moved = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        text: Tensor = self.cache.__dict__[_TEXT]
        (how,) = (*args, *kwargs.values())
        new = text.repeat_interleave(how, 0) if self.name == _REPEAT else text[how.to(text.device)]
        self.cache.__dict__[_TEXT] = new
        return moved


def whole_text(call: CurrentCall) -> Int[Tensor, "batch text"]:
    """Returns the ids of a call with those in its cache before them, as far as they are known. Others are `UNKNOWN`.

    Raises:
        StateError: if the call has no ids, or another number of examples than its cache.
    """
    if _TEXT not in call.kept:
        call.kept[_TEXT] = _joined(call)
    text: Tensor = call.kept[_TEXT]
    return text


def keep_text(call: CurrentCall, output: Any) -> None:
    """Notes the text of a call that is over on its caches, if it was asked for.

    Args:
        output: what the backbone returned; None if it raised.
    """
    text = call.kept.get(_TEXT)
    if text is None or output is None:
        return
    results = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    for cache in (call.cache, *results):
        moves = {name: MovesText(cache, name) for name in _MOVES if hasattr(type(cache), name)}
        if moves:
            vars(cache).update(moves, **{_TEXT: text})


def _joined(call: CurrentCall) -> Tensor:
    ids, start = call.ids, call.start
    if ids is None or ids.ndim != 2:
        found = "a call without them" if ids is None else f"the shape {tuple(ids.shape)}"
        raise StateError(
            f"a delta here looks for tokens in the text: expected input_ids [batch, tokens], found {found}; pass input_ids "
            "instead of inputs_embeds"
        )
    known = getattr(call.cache, "__dict__", {}).get(_TEXT)
    if start == 0 or (start is None and known is None):
        return ids
    known = ids.new_empty(len(ids), 0) if known is None else known.to(ids)
    if len(known) != len(ids):
        raise StateError(
            f"the cache in past_key_values holds {len(known)} texts, and the call has {len(ids)}; change the number of its "
            "examples by its own functions (batch_repeat_interleave, batch_select_indices), or start with an empty cache"
        )
    if start is not None:
        # Assisted decoding crops caches; and a delta that is inactive or detached does not ask for the text.
        known = F.pad(known[:, :start], (0, max(0, start - known.shape[1])), value=UNKNOWN)
    return torch.cat([known, ids], 1)
