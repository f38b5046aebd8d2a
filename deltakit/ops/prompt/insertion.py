"""How the ids of soft prompts are put into a call of a text stack, and their rows taken out of its result.

A prompt enters as ids and not as `inputs_embeds`: with ids, classification heads that look for the last token, positions
that are derived from padding, and `generate` stay right (measured on GPT-2, Llama, BART and RoBERTa).

Where rows of a batch have prompts of different lengths, the shorter ones are filled up with padding that is masked. Behind
the text it moves nothing. Where a cache is filled it must stand ahead, for what is generated follows the text;
then the positions of all that follows are the row's own only if they are given, or follow from the mask or the padding.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltakit.core import MixedBatch
from deltakit.errors import StateError
from deltakit.ops.prompt.text_stack import Stack, names_of_arguments


class Layout(NamedTuple):
    """Where the ids stand that are put into each text: `width` of them in all, from the place `at` on.

    `lengths`: how many of them are the row's own prompt; the others are padding, ahead of it or (`behind`) after the text.
    """

    width: int
    at: int
    lengths: tuple[int, ...] | None = None
    behind: bool = False

    def own(self, device: torch.device) -> Int64[Tensor, "rows 1"]:
        """How long each row's prompt is."""
        return torch.tensor(self.lengths or (self.width,), device=device)[:, None]

    def spread(self, text: Tensor, prompt: Tensor, padding: int) -> Tensor:
        """[rows, length + width]: what stands for the text's tokens, the prompt's and the padding, in their places."""
        length, own = text.shape[1], self.own(text.device)
        place = torch.arange(-self.at, length + self.width - self.at, device=text.device)
        lead, step = (torch.zeros_like(own), own) if self.behind else (self.width - own, self.width)
        of_text = torch.where(place < 0, place, place - step) + self.at
        padded = of_text >= length if self.behind else (place >= 0) & (place < lead)
        take = torch.where((place >= lead) & (place < lead + own), length + place - lead, of_text)
        take = torch.where(padded, length + self.width, take)
        rows = max(text.shape[0], take.shape[0])
        columns = [text.expand(rows, -1), prompt.to(text.dtype).expand(rows, -1), text.new_full((rows, 1), padding)]
        return torch.cat(columns, 1).gather(1, take.expand(rows, -1))

    def without(self, x: Tensor, length: int) -> Tensor:
        """Hidden states [rows, length, d] or attentions [rows, heads, length, length] of the text's tokens alone."""
        for dim in {3: (1,), 4: (2, 3)}.get(x.ndim, ()):
            if x.shape[dim] != length + self.width:
                continue
            if self.behind:
                text = torch.arange(length, device=x.device)
                index = torch.where(text < self.at, text, text + self.own(x.device))
                shape = [x.shape[0], *(length if d == dim else 1 for d in range(1, x.ndim))]
                sizes = [length if d == dim else size for d, size in enumerate(x.shape)]
                x = x.gather(dim, index.view(shape).expand(sizes))
            else:
                parts = x.narrow(dim, 0, self.at), x.narrow(dim, self.at + self.width, length - self.at)
                x = torch.cat(parts, dim)
        return x


class Insertion(NamedTuple):
    """What a soft prompt puts into each text: `width` ids from `first` on, at the place `at`.

    `stack`: what is known of the text stack. `trim`: whether the rows of the prompt are taken out of the result, as they are
    but in an encoder, of which a decoder sees them.
    """

    first: int
    width: int
    at: int
    stack: Stack
    trim: bool


def layout_for(
    wanted: Insertion,
    lengths: int | tuple[int, ...],
    batch: MixedBatch | None,
    module: nn.Module,
    rows: Tensor,
    *,
    cache: bool,
) -> Layout:
    """The layout for a call of as many rows as these, with prompts of this length, or of these for each name of the batch.

    Raises:
        StateError: if the rows do not fit those that `rows` was given names for.
    """
    if isinstance(lengths, int) or batch is None:
        return Layout(wanted.width, wanted.at)
    if min(lengths) == max(lengths):
        return Layout(lengths[0], wanted.at)
    times = batch.times(rows.unsqueeze(-1), module)
    behind = not (cache and wanted.trim)
    return Layout(max(lengths), wanted.at, tuple(n for n in lengths for _ in range(times)), behind)


def insert(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wanted: Insertion,
    lengths: int | tuple[int, ...],
    batch: MixedBatch | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the ids of prompts put in, and all that goes by length.

    With a filled cache, which holds the prompt already, only the mask grows and positions move on.

    Raises:
        StateError: if the call has no ids, a mask that cannot grow, or positions that cannot be told.
    """
    call = {**dict(zip(names_of_arguments(module), args, strict=False)), **kwargs}
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor):
        raise StateError(
            f"{type(module).__name__}: a soft prompt is inserted as token ids, and this call has none (inputs_embeds?); "
            "call the model with input_ids, or attach SoftPrompt(prepend=False)"
        )
    if getattr(call.get("past_key_values"), "is_compileable", False):
        raise StateError(
            f"{type(module).__name__}: a soft prompt cannot be inserted with a static cache, whose length is set "
            "beforehand; use a dynamic one"
        )
    cached = _cached(call)
    layout = layout_for(wanted, lengths, batch, module, ids, cache=_may_cache(module, call, wanted))
    mask = call.get("attention_mask")
    if layout.lengths is not None:
        _check_hidden(module, wanted, layout)
        _tell_positions(module, call, wanted, layout, cached=cached)
        mask = _ones(call, ids, layout, cached=cached) if mask is None else mask
    if isinstance(mask, Tensor):
        call["attention_mask"] = grown_mask(module, mask, layout)
    if isinstance(call.get("position_ids"), Tensor):
        call["position_ids"] = _positions(call["position_ids"], layout, cached)
    if isinstance(call.get("cache_position"), Tensor):
        call["cache_position"] = _positions(call["cache_position"], Layout(layout.width, layout.at), cached)
    if cached:
        return (), call
    prompt = wanted.first + torch.arange(layout.width, device=ids.device)
    call["input_ids"] = layout.spread(ids, prompt, _padding(module))
    call["input_ids"].with_prompt = layout
    if isinstance(call.get("token_type_ids"), Tensor):
        call["token_type_ids"] = layout.spread(call["token_type_ids"], torch.zeros_like(prompt), 0)
    return (), call


def _ones(call: Mapping[str, Any], ids: Tensor, layout: Layout, *, cached: bool) -> Tensor | None:
    """The mask of texts without padding, as long as what was seen of them. None where a recurrence holds the past: it has
    hidden the padding already, and takes a mask for new tokens alone."""
    if not cached:
        return torch.ones_like(ids)
    cache = call.get("past_key_values")
    try:
        seen = int(cache.get_seq_length()) if cache is not None else 0
    except (AttributeError, ValueError):
        seen = 0
    return ids.new_ones(ids.shape[0], seen - layout.width + ids.shape[1]) if seen else None


def _check_hidden(module: nn.Module, wanted: Insertion, layout: Layout) -> None:
    if not wanted.stack.hides:
        raise StateError(
            f"{type(module).__name__}: the rows of this batch have soft prompts of different lengths {layout.lengths}, so the "
            "shorter ones need padding, and that its blocks heed a mask everywhere cannot be told (they hold more than "
            "attention); give all rows prompts of one length"
        )


def grown_mask(module: nn.Module, mask: Tensor, layout: Layout) -> Tensor:
    """A mask [rows, length] that lets the prompts be seen too, and their padding not."""
    if mask.ndim != 2:
        raise StateError(
            f"{type(module).__name__}: a soft prompt cannot be inserted under a mask of shape {tuple(mask.shape)}; expected "
            "[batch, length]; a static cache makes such masks: use a dynamic one"
        )
    return layout.spread(mask, torch.ones(layout.width, device=mask.device), 0)


def trimmed(output: Any, length: int, layout: Layout) -> Any:
    """A model's result without the rows of prompts: hidden states and attentions as long as the caller's input."""
    if isinstance(output, Tensor):
        return layout.without(output, length)
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(trimmed(value, length, layout) for value in output)
    if isinstance(output, Mapping):
        rows = {
            key: value for key, value in output.items() if key in ("last_hidden_state", "hidden_states", "attentions")
        }
        new = {key: trimmed(value, length, layout) for key, value in rows.items()}
        return type(output)(**{**output, **new})
    return output


def _may_cache(module: nn.Module, call: Mapping[str, Any], wanted: Insertion) -> bool:
    """Whether a call may fill a cache, or go on from one."""
    if call.get("past_key_values") is not None:
        return True
    if not wanted.stack.caches:
        return False
    asked = call.get("use_cache")
    return bool(getattr(getattr(module, "config", None), "use_cache", False) if asked is None else asked)


def _tell_positions(
    module: nn.Module, call: dict[str, Any], wanted: Insertion, layout: Layout, *, cached: bool
) -> None:
    """Gives positions to a call in which padding stands ahead of prompts, where they do not follow by themselves."""
    if (
        layout.behind
        or isinstance(call.get("position_ids"), Tensor)
        or wanted.stack.positions in ("padding", "relative")
    ):
        return
    ids, mask = call["input_ids"], call.get("attention_mask")
    plain = mask is None or (isinstance(mask, Tensor) and bool(mask[:, 0].all()))
    if wanted.stack.positions == "unknown" or cached or not plain:
        hint = "give position_ids, or " if wanted.stack.positions == "given" else ""
        raise StateError(
            f"{type(module).__name__}: the rows of this batch have soft prompts of different lengths {layout.lengths}, and "
            f"which positions their tokens have cannot be told; {hint}call it with use_cache=False, or give all rows "
            "prompts of one length"
        )
    call["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]


def _positions(positions: Tensor, layout: Layout, cached: bool) -> Tensor:
    """Positions [length], [rows, length] or [kinds, rows, length] with those of the prompts among them."""
    if positions.ndim > 2:
        return torch.stack([_positions(kind, layout, cached) for kind in positions])
    rows = positions if positions.ndim == 2 else positions[None]
    own = layout.own(positions.device)
    if cached:
        moved = rows + own
    else:
        start = rows[:, layout.at - 1 : layout.at] + 1 if layout.at else torch.zeros_like(rows[:, :1])
        later = torch.arange(rows.shape[1], device=rows.device) >= layout.at
        moved = layout.spread(rows + own * later, start + torch.arange(layout.width, device=rows.device), 0)
    return moved if positions.ndim == 2 else moved[0]


def _padding(module: nn.Module) -> int:
    padding = getattr(getattr(module, "config", None), "pad_token_id", None)
    return padding if isinstance(padding, int) and padding >= 0 else 0


def _cached(call: Mapping[str, Any]) -> bool:
    """Whether a call goes on from a cache that is filled: of keys and values, or the state of a recurrence."""
    caches = [call[name] for name in ("past_key_values", "cache_params", "state") if call.get(name) is not None]
    return any(_filled(cache) for cache in caches)


def _filled(cache: Any) -> bool:
    if isinstance(cache, list | tuple):
        return bool(cache)
    for asks in ("get_seq_length", "has_previous_state"):
        try:
            return bool(getattr(cache, asks)())
        except (AttributeError, ValueError):
            # transformers' caches raise where they have no layer of the kind that is asked about.
            continue
    return False
