"""Prefixes in models that call transformers' attention interface.

Every such call passes the attention module first, inside its forward (all 483 calls of transformers 5.23). So one wrapper
that looks for prefixes on that module serves all architectures, threads, recomputation and exceptions alike. It is put
around `AttentionInterface.get_interface` once and stays: without prefixes it costs about 2 microseconds a call, and a
count of who still needs it would be lost in deepcopies.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.errors import StateError
from deltakit.ops.attention.kernel import (
    causal,
    joined,
    joined_per_example,
    live_prefixes,
    prepend,
    widen,
    widen_per_example,
)

# These say which keys a query may see by place or by page; a prefix has neither.
_BY_PLACE = ("indices", "block_indices", "cache", "block_table", "cu_seq_lens_q", "cu_seq_lens_k")


def install_prefixes() -> None:
    """Makes transformers' attention interface see prefixes, if transformers is loaded and does not yet."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    interface = modeling.AttentionInterface
    if not hasattr(interface.get_interface, "sees_prefixes"):
        interface.get_interface = _seeing(interface.get_interface)
        if "torch._dynamo" in sys.modules:
            # What was compiled before calls the kernels directly.
            torch.compiler.reset()


def _seeing(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_interface(self: Any, attn_implementation: str, default: Any) -> Any:
        return partial(attend, original(self, attn_implementation, default), attn_implementation)

    get_interface.sees_prefixes = True  # type: ignore[attr-defined]
    return get_interface


def attend(
    kernel: Callable[..., Any],
    implementation: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What a kernel of the attention interface returns, with the live prefixes of the module seen by every query.

    Raises:
        StateError: if the kernel chooses its keys by place or by page, which leaves no room for a prefix.
    """
    prefixes = live_prefixes(module)
    if not prefixes:
        return kernel(module, query, key, value, attention_mask, *args, **kwargs)
    _refuse(module, implementation or "eager", attention_mask, kwargs)
    batch = prefixes[0].record.batch if prefixes[0].record is not None else None
    if batch is None:
        prefix_key, prefix_value = joined(prefixes)
        length = prefix_key.shape[1]
        mask = _mask(module, implementation, query, key, attention_mask, length, kwargs)
    else:
        prefix_key, prefix_value, seen = joined_per_example(prefixes, batch, batch.times(query, module))
        length = seen.shape[1]
        mask = _mask(module, implementation, query, key, attention_mask, 0, kwargs)
        if mask is None:
            mask = query.new_zeros(1, 1, query.shape[-2], key.shape[-2])
        mask = widen_per_example(mask, seen)
    if isinstance(kwargs.get("position_bias"), Tensor):
        kwargs["position_bias"] = widen(kwargs["position_bias"], length)
    key, value = prepend(prefix_key, key, module), prepend(prefix_value, value, module)
    output, weights, *rest = kernel(module, query, key, value, mask, *args, **kwargs)
    if isinstance(weights, Tensor) and weights.shape[-1] == key.shape[-2]:
        weights = weights[..., length:]
    return (output, weights, *rest)


def _refuse(module: nn.Module, implementation: str, mask: Any, kwargs: dict[str, Any]) -> None:
    found = next((name for name in _BY_PLACE if kwargs.get(name) is not None), None)
    if "flash" in implementation and kwargs.get("sliding_window") is not None:
        found = "sliding_window with flash attention"
    if mask is not None and not isinstance(mask, Tensor):
        found = f"a mask of type {type(mask).__name__}"
    if found is not None:
        raise StateError(
            f"{type(module).__name__}: a prefix cannot enter attention with {found}; load the model with "
            "attn_implementation='sdpa' or 'eager', or leave this module out with exclude="
        )


def _mask(
    module: nn.Module,
    implementation: str | None,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    length: int,
    kwargs: dict[str, Any],
) -> Tensor | None:
    if mask is not None:
        return widen(mask, length)
    # Without a mask, only the sdpa kernel is causal by itself, aligned to the upper left.
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if implementation == "sdpa" and is_causal and query.shape[-2] > 1:
        return causal(query.shape[-2], key.shape[-2], length, query.device)[None, None]
    return None
