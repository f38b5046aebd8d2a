"""Records ids, mask and cache length of the backbone's current call for delta modules."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from deltakit.core import CurrentCall, begin_call, end_call, keep_text, running_call

_IDS, _MASK, _CACHE = ("input_ids", "decoder_input_ids"), ("attention_mask",), ("past_key_values", "cache_params")


class CallObserver:
    """Sets the current call during the forwards of a backbone that has delta modules with `reads_call`."""

    def begin(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Records the arguments of the backbone's call."""
        # There are no keyword arguments while another thread attaches or detaches (see `InputHook`).
        call = _named(backbone, args, kwargs or {})
        ids = _first_tensor(call, _IDS)
        if ids is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            # The user's own models may name their ids differently.
            ids = args[0]
        mask, cache = _first_tensor(call, _MASK), _cache(call)
        current = CurrentCall(ids, mask, _seen(cache), id(backbone), running_call(), cache=cache)
        begin_call(current, backbone, (args, kwargs))

    def end(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Ends the call. After an interruption that skips this, the call is known to be over."""
        call = end_call(backbone, output)
        if call is not None:
            keep_text(call, output)


def mask_of(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the attention mask that a backbone is called with; None if there is none."""
    return _first_tensor(_named(backbone, args, kwargs), _MASK)


def _named(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_argument_names(type(backbone).forward), args, strict=False)), **kwargs}


@lru_cache(256)
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _first_tensor(call: dict[str, Any], names: tuple[str, ...]) -> Tensor | None:
    return next((call[name] for name in names if isinstance(call.get(name), Tensor)), None)


def _cache(call: dict[str, Any]) -> Any:
    return next((call[name] for name in _CACHE if call.get(name) is not None), None)


def _seen(cache: Any) -> int | None:
    """Returns the number of tokens in a cache before this call; None if it holds some and does not say how many."""
    try:
        return int(cache.get_seq_length()) if cache is not None else 0
    except (AttributeError, ValueError):
        # transformers' caches for recurrent layers have no length.
        filled = getattr(cache, "has_previous_state", None)
        return None if filled is not None and filled() else 0
