"""Caches of keys and values that hold a soft prompt beside the text.

`generate` takes the length of a cache that it is given for the number of the text's tokens in it, and cuts that many of them
from the ids. With the prompt counted in, it would cut away new tokens of the user (measured on GPT-2 and Llama: as many as the
prompt has). So between calls a cache reports its length without the prompt, and during a call of the text stack all of it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from deltakit.errors import StateError
from deltakit.ops.prompt.layout import Layout

# All are attributes of the cache itself, so that they follow its copies and pickles. The first one stays during a call.
_PROMPT, _LENGTH, _UPDATE = "_deltakit_prompt", "get_seq_length", "update"


class TextLength:
    """The `get_seq_length` of a cache between calls: its length without the prompt."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        # A cache that was reset is empty.
        stored = int(type(self.cache).get_seq_length(self.cache, *args, **kwargs))
        return max(0, stored - self.cache.__dict__[_PROMPT].width)


class NoUpdate:
    """The `update` of a cache between calls. It runs only if a model uses the cache without the soft prompt."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise StateError(
            "the cache in past_key_values holds a soft prompt, and no soft prompt takes part in this call (its delta is "
            "inactive or detached, or `rows` has None here); start again with an empty cache"
        )


def continues(module: nn.Module, call: Mapping[str, Any], layout: Layout) -> bool:
    """Returns whether a call continues from a filled cache, whose prompt must be the one of this call.

    Args:
        call: the arguments of the text stack's call, by name.
        layout: where the prompt of this call belongs.

    Raises:
        StateError: if the cache was filled without a prompt or with another one, or if the mask has the wrong length.
    """
    cache, stored = call.get("past_key_values"), stored_length(call)
    if not stored:
        # Lists of keys and values, and the state of a recurrence, have no length.
        return _has_state(call)
    held = vars(cache).get(_PROMPT, Layout(0, layout.at))
    if not _same(held, layout):
        raise StateError(
            f"{type(module).__name__}: the cache in past_key_values was filled with {_described(held)}, and this call has "
            f"{_described(layout)}; start again with an empty cache"
        )
    mask, ids = call.get("attention_mask"), call["input_ids"]
    text = stored - layout.width
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != text + ids.shape[1]:
        raise StateError(
            f"{type(module).__name__}: expected an attention_mask with {text + ids.shape[1]} columns, for {text} tokens of "
            f"text in the cache and {ids.shape[1]} new ones (the soft prompt does not count), found {mask.shape[1]}; pass a "
            "mask for the text, or start again with an empty cache"
        )
    return True


def open_cache(call: Mapping[str, Any]) -> None:
    """Makes the cache of a call report its full length, until `close_cache`."""
    for name in (_LENGTH, _UPDATE):
        getattr(call.get("past_key_values"), "__dict__", {}).pop(name, None)


def close_cache(call: Mapping[str, Any], output: Any, layout: Layout) -> None:
    """Makes the caches of a call that is over report their lengths without the prompt."""
    results = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    for cache in (call.get("past_key_values"), *results):
        if layout.width and hasattr(type(cache), _LENGTH):
            vars(cache).update({_PROMPT: layout, _LENGTH: TextLength(cache), _UPDATE: NoUpdate()})


def stored_length(call: Mapping[str, Any]) -> int:
    """Returns the number of tokens in a call's cache, with those of the prompt; 0 if the cache has no length."""
    cache = call.get("past_key_values")
    try:
        return int(type(cache).get_seq_length(cache))  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        # transformers' caches raise if they have no layer of attention.
        return 0


def _has_state(call: Mapping[str, Any]) -> bool:
    for cache in (call.get(name) for name in ("past_key_values", "cache_params", "state")):
        if isinstance(cache, list | tuple):
            return bool(cache)
        try:
            if cache is not None and cache.has_previous_state():
                return True
        except (AttributeError, ValueError):
            continue
    return False


def _same(held: Layout, layout: Layout) -> bool:
    if (held.width, held.at) != (layout.width, layout.at):
        return False
    # Beam search repeats examples, and callers select some of them. Then only the widths can be compared.
    sizes = {len(lengths) for lengths in (held.lengths, layout.lengths) if lengths is not None}
    return len(sizes) == 2 or held.lengths == layout.lengths


def _described(layout: Layout) -> str:
    if not layout.width:
        return "no soft prompt"
    lengths = layout.width if layout.lengths is None else layout.lengths
    return f"a soft prompt of {lengths} tokens after {layout.at} of the text"
