"""Tells delta modules what the backbone's call is about: ids, mask, and how many tokens the cache holds."""

import inspect
from typing import Any

from torch import Tensor, nn

from deltakit.core import CurrentCall, begin_call, end_call

_IDS, _MASK, _CACHE = ("input_ids", "decoder_input_ids"), ("attention_mask",), ("past_key_values", "cache_params")


class CallObserver:
    """Stands on a backbone that holds delta modules with `reads_call`, and keeps the current call for its time."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def begin(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes what the backbone is called with."""
        names = list(inspect.signature(type(backbone).forward).parameters)[1:]
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = _first_tensor(call, _IDS)
        if ids is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            # A backbone of the user's own takes its ids under any name.
            ids = args[0]
        begin_call(CurrentCall(ids, _first_tensor(call, _MASK), _seen(call), id(backbone)))

    def end(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Forgets the call. Where an interruption leaves it, the next call of the backbone replaces it."""
        end_call()


def _first_tensor(call: dict[str, Any], names: tuple[str, ...]) -> Tensor | None:
    return next((call[name] for name in names if isinstance(call.get(name), Tensor)), None)


def _seen(call: dict[str, Any]) -> int:
    """How many tokens the cache holds ahead of this call."""
    cache = next((call[name] for name in _CACHE if call.get(name) is not None), None)
    try:
        return int(cache.get_seq_length()) if cache is not None else 0
    except (AttributeError, ValueError):
        # transformers' caches of recurrent layers have no length.
        return 0
