"""Inserts the ids of soft prompts into a call of a text stack, and removes their hidden states from its result.

A prompt enters as ids and not as `inputs_embeds`. With `inputs_embeds`, classification heads that look for the last token
that is not padding read the wrong one (measured: GPT-2 off by 0.73, Llama by 1.7), BART's classifier refuses the call, and
RoBERTa loses the positions that it derives from padding. With ids all of them are exact.

If the examples of a batch have prompts of different lengths, the shorter prompts are filled with masked padding. Padding
behind the text changes no position. If a cache is filled, padding must be ahead of the prompt, because generated tokens
follow the text directly. Then positions are right only if they are given, or derived from the mask or the padding.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from deltakit.core import MixedBatch, note_inserted
from deltakit.errors import StateError
from deltakit.ops.prompt.cache import close_cache, continues, open_cache, stored_length
from deltakit.ops.prompt.layout import Layout
from deltakit.ops.prompt.text_stack import Stack, names_of_arguments


class Insertion(NamedTuple):
    """What a soft prompt inserts into each text: `width` ids, counted up from `first`, after the first `at` tokens.

    `stack` is what is known of the text stack. `trim` says whether the prompt's hidden states are removed from the result, and
    `encodes` whether the stack is the encoder of a decoder. They stay in its result, because the decoder must attend to them.
    """

    first: int
    width: int
    at: int
    stack: Stack
    trim: bool
    encodes: bool


def layout_for(
    wanted: Insertion,
    lengths: int | tuple[int, ...],
    batch: MixedBatch | None,
    module: nn.Module,
    rows: Shaped[Tensor, "examples ..."],
    *,
    cache: bool,
) -> Layout:
    """Returns the layout for a call.

    Args:
        lengths: the length of the prompt, or one length for each name of the mixed batch.
        batch: the mixed batch, if one is active.
        rows: a tensor whose first dimension is the number of examples.
        cache: whether the call may fill a cache.

    Raises:
        StateError: if the number of examples does not fit the names that `rows` was given.
    """
    # Most calls end in one of these two cases, without any padding.
    if isinstance(lengths, int) or batch is None:
        return Layout(wanted.width, wanted.at)
    if min(lengths) == max(lengths):
        return Layout(lengths[0], wanted.at)
    # Beam search repeats each example, so one name may stand for several of them.
    times = batch.times(rows.unsqueeze(-1), module)
    behind = wanted.encodes or not cache
    return Layout(max(lengths), wanted.at, tuple(n for n in lengths for _ in range(times)), behind)


def insert(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wanted: Insertion,
    lengths: int | tuple[int, ...],
    batch: MixedBatch | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with the prompts' ids inserted, and mask, token types and positions to match.

    If the call continues from a filled cache, which holds the prompt already, only the mask and the positions change.

    Args:
        lengths: the length of the prompt, or one length for each name of the mixed batch.
        batch: the mixed batch, if one is active.

    Raises:
        StateError: if the call has no `input_ids`, has a static cache, a cache with another prompt or a mask that does not
            fit, or has prompts of different lengths whose positions or mask this text stack cannot handle.
    """
    call = {**dict(zip(names_of_arguments(module), args, strict=False)), **kwargs}
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor):
        raise StateError(
            f"{type(module).__name__}: a soft prompt is inserted as token ids, and this call has no input_ids; call the model "
            "with input_ids instead of inputs_embeds, or attach SoftPrompt(prepend=False)"
        )
    if getattr(call.get("past_key_values"), "is_compileable", False):
        raise StateError(
            f"{type(module).__name__}: a soft prompt cannot be inserted with a static cache, because the length of that is "
            "fixed; use a dynamic cache"
        )
    layout = layout_for(wanted, lengths, batch, module, ids, cache=_may_cache(module, call, wanted))
    # Checked before anything changes: a filled cache holds the prompt already, and it must not be inserted twice.
    cached = continues(module, call, layout)
    mask = call.get("attention_mask")
    if layout.lengths is not None:
        _check_hidden(module, wanted, layout)
        # Padding needs a mask, and positions must be known, so both are made here if the caller passed none.
        _add_positions(module, call, wanted, layout, cached=cached)
        mask = _ones(call, ids, layout, cached=cached) if mask is None else mask
    if isinstance(mask, Tensor):
        call["attention_mask"] = grown_mask(module, mask, layout)
    if isinstance(call.get("position_ids"), Tensor):
        call["position_ids"] = _positions(call["position_ids"], layout, cached)
    # One `cache_position` serves all examples: it counts slots of the cache, padding included.
    if isinstance(call.get("cache_position"), Tensor):
        call["cache_position"] = _positions(call["cache_position"], Layout(layout.width, layout.at), cached)
    open_cache(call)
    if cached:
        # An alias, because the caller's own tensor must not get the attribute.
        call["input_ids"] = ids.view_as(ids)
        call["input_ids"].in_cache = layout
    else:
        _insert_ids(module, call, wanted.first, layout)
    return (), call


def _insert_ids(module: nn.Module, call: dict[str, Any], first: int, layout: Layout) -> None:
    """Inserts the prompt's ids, counted up from `first`, and token types for them."""
    # The ids start at the size of the vocabulary. A hook on the embedding writes their vectors.
    prompt = first + torch.arange(layout.width, device=call["input_ids"].device)
    call["input_ids"] = layout.spread(call["input_ids"], prompt, _padding(module))
    # `finish` reads the layout from the ids at the end of this forward: a field on the module would be shared by threads,
    # and would survive an exception.
    call["input_ids"].with_prompt = layout
    note_inserted(layout)
    if isinstance(call.get("token_type_ids"), Tensor):
        call["token_type_ids"] = layout.spread(call["token_type_ids"], torch.zeros_like(prompt), 0)


def _ones(
    call: Mapping[str, Any], ids: Shaped[Tensor, "examples length"], layout: Layout, *, cached: bool
) -> Shaped[Tensor, "examples seen"] | None:
    """A mask of ones for texts without padding, as long as all their tokens so far.

    None if the cache is the state of a recurrence: it has masked the padding already, and takes masks for new tokens only.
    """
    if not cached:
        return torch.ones_like(ids)
    seen = stored_length(call)
    return ids.new_ones(ids.shape[0], seen - layout.width + ids.shape[1]) if seen else None


def _check_hidden(module: nn.Module, wanted: Insertion, layout: Layout) -> None:
    if not wanted.stack.hides:
        raise StateError(
            f"{type(module).__name__}: the examples of this batch have soft prompts of different lengths {layout.lengths}, so "
            "the shorter ones need padding, and its blocks may ignore the mask of padding (they contain more than "
            "attention); use prompts of one length in a batch"
        )


def grown_mask(module: nn.Module, mask: Shaped[Tensor, "..."], layout: Layout) -> Shaped[Tensor, "examples total"]:
    """Returns the mask with ones for the prompts and zeros for their padding.

    Raises:
        StateError: if the mask is not [batch, length].
    """
    if mask.ndim != 2:
        raise StateError(
            f"{type(module).__name__}: a soft prompt cannot be inserted under a mask of shape {tuple(mask.shape)}: expected "
            "[batch, length]; pass such a mask, and use a dynamic cache, because a static one makes masks of 4 dimensions"
        )
    return layout.spread(mask, torch.ones(layout.width, device=mask.device), 0)


def finish(call: Mapping[str, Any], output: Any, *, trim: bool) -> Any:
    """Ends a call of the text stack: returns its result without the prompt, if `trim` is set, and hides it in the cache."""
    # There are none by keyword if the prompt was attached while the call ran.
    ids = call.get("input_ids")
    layout = getattr(ids, "with_prompt", None)
    held = layout or getattr(ids, "in_cache", None)
    if held is not None:
        close_cache(call, output, held)
    return output if layout is None or ids is None or not trim else trimmed(output, ids.shape[1] - layout.width, layout)


def trimmed(output: Any, length: int, layout: Layout) -> Any:
    """Returns a model's result without the prompts: hidden states and attention weights as long as the caller's input.

    Args:
        length: the number of tokens that the caller passed.
    """
    if isinstance(output, Tensor):
        return layout.without(output, length)
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(trimmed(value, length, layout) for value in output)
    if isinstance(output, Mapping):
        by_token = {
            key: value for key, value in output.items() if key in ("last_hidden_state", "hidden_states", "attentions")
        }
        new = {key: trimmed(value, length, layout) for key, value in by_token.items()}
        return type(output)(**{**output, **new})
    return output


def _may_cache(module: nn.Module, call: Mapping[str, Any], wanted: Insertion) -> bool:
    """Whether a call may fill a cache, or continue from one."""
    if call.get("past_key_values") is not None:
        return True
    if not wanted.stack.caches:
        return False
    # transformers uses the config's setting if the caller passes none.
    asked = call.get("use_cache")
    return bool(getattr(getattr(module, "config", None), "use_cache", False) if asked is None else asked)


def _add_positions(module: nn.Module, call: dict[str, Any], wanted: Insertion, layout: Layout, *, cached: bool) -> None:
    """Adds positions to a call with padding ahead of prompts, if the text stack does not derive the right ones itself.

    Raises:
        StateError: if the right positions are unknown.
    """
    if (
        layout.behind
        or isinstance(call.get("position_ids"), Tensor)
        or wanted.stack.positions in ("padding", "relative")
    ):
        return
    ids, mask = call["input_ids"], call.get("attention_mask")
    plain = mask is None or (isinstance(mask, Tensor) and bool(mask[:, 0].all()))
    if wanted.stack.positions == "unknown" or cached or not plain:
        # Without a mask or with one that starts with ones, texts are padded on the right and positions count from 0. With
        # padding on the left, models disagree on the positions of the text.
        hint = "pass position_ids, or " if wanted.stack.positions == "given" else ""
        raise StateError(
            f"{type(module).__name__}: the examples of this batch have soft prompts of different lengths {layout.lengths}, "
            f"and the positions of their tokens cannot be determined; {hint}call it with use_cache=False, or use prompts of "
            "one length in a batch"
        )
    call["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]


def _positions(positions: Tensor, layout: Layout, cached: bool) -> Tensor:
    """Positions [length], [examples, length] or [axes, examples, length] (Qwen2-VL has three) with the prompts' inserted."""
    if positions.ndim > 2:
        return torch.stack([_positions(kind, layout, cached) for kind in positions])
    rows = positions if positions.ndim == 2 else positions[None]
    own = layout.own(positions.device)
    if cached:
        moved = rows + own
    else:
        # The prompt continues the positions of the text before it, and the text after it moves on by its length.
        start = rows[:, layout.at - 1 : layout.at] + 1 if layout.at else torch.zeros_like(rows[:, :1])
        later = torch.arange(rows.shape[1], device=rows.device) >= layout.at
        moved = layout.spread(rows + own * later, start + torch.arange(layout.width, device=rows.device), 0)
    return moved if positions.ndim == 2 else moved[0]


def _padding(module: nn.Module) -> int:
    # Text stacks that derive positions from padding need their own padding id. For all others the mask hides any id.
    padding = getattr(getattr(module, "config", None), "pad_token_id", None)
    return padding if isinstance(padding, int) and padding >= 0 else 0
