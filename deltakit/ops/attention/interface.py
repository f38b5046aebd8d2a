"""Prefixes in models that call transformers' attention interface.

All 483 calls of the interface in transformers 5.23 pass the attention module as the first argument, inside its forward. So
one wrapper that looks for prefixes on this module serves all architectures, and needs no state that threads, recomputation
or exceptions could confuse. It is installed around `AttentionInterface.get_interface` once and never removed: it costs
about 2 microseconds a call on modules without prefixes, and a count of its users would be wrong after a deepcopy or an
unpickling, so that the copy would lose its prefixes without an error.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.errors import StateError
from deltakit.ops.attention.beside import AttentionBeside, beside
from deltakit.ops.attention.first_block import FRONT
from deltakit.ops.attention.kernel import (
    AttentionPrefix,
    causal,
    joined,
    joined_per_example,
    live_prefixes,
    prepend,
    widen,
    widen_per_example,
)

# Arguments that address keys by index or by page of memory. A prefix has no index and no page.
_KEY_ADDRESSES = ("indices", "block_indices", "cache", "block_table", "cu_seq_lens_q", "cu_seq_lens_k")


def install_prefixes() -> None:
    """Installs the wrapper around transformers' attention interface, if transformers is loaded and not wrapped yet."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    interface = modeling.AttentionInterface
    if not hasattr(interface.get_interface, "sees_prefixes"):
        interface.get_interface = _with_prefixes(interface.get_interface)
        if "torch._dynamo" in sys.modules:
            # Graphs that were compiled before call the kernels directly, and would ignore prefixes.
            torch.compiler.reset()


def _with_prefixes(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_interface(self: Any, attn_implementation: str, default: Any) -> Any:
        return partial(attend, original(self, attn_implementation, default), attn_implementation)

    get_interface.sees_prefixes = True  # type: ignore[attr-defined]
    return get_interface


def attend(
    kernel: Callable[..., Any],
    implementation: str | None,
    module: nn.Module,
    query: Float[Tensor, "*query_batch queries d_k"],
    key: Float[Tensor, "*batch keys d_k"],
    value: Float[Tensor, "*batch keys d_v"],
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a kernel of the attention interface with the live prefixes of the module ahead of its keys and values.

    Returns what the kernel returns. The prefixes' columns are removed from attention weights.

    Args:
        implementation: the kernel's name, such as "sdpa"; None for eager attention.

    Raises:
        StateError: if the kernel addresses keys by index or page, cuts a window with flash attention, or has a mask that
            is not a tensor; and if the sizes of a prefix do not fit the keys and values.
    """
    found, front = live_prefixes(module), kwargs.pop(FRONT, None)
    if not found:
        return kernel(module, query, key, value, attention_mask, *args, **kwargs)
    others = [one for one in found if isinstance(one, AttentionBeside)]
    prefixes = [one for one in found if one not in others] if others else found
    attended = _attend_with(
        prefixes, front, kernel, implementation, module, query, key, value, attention_mask, *args, **kwargs
    )
    if not others:
        return attended
    output, *rest = attended
    return (output + beside(others, module, query, kwargs.get("scaling")).transpose(1, 2), *rest)


def _attend_with(
    prefixes: Sequence[AttentionPrefix],
    front: Any,
    kernel: Callable[..., Any],
    implementation: str | None,
    module: nn.Module,
    query: Float[Tensor, "*query_batch queries d_k"],
    key: Float[Tensor, "*batch keys d_k"],
    value: Float[Tensor, "*batch keys d_v"],
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a kernel with these prefixes."""
    if not prefixes:
        return kernel(module, query, key, value, attention_mask, *args, **kwargs)
    _refuse(module, implementation or "eager", attention_mask, kwargs)
    batch = prefixes[0].batch
    if batch is None:
        prefix_key, prefix_value = joined(prefixes)
        length = prefix_key.shape[-2]
        mask = _mask(module, implementation, query, key, attention_mask, length, kwargs)
    else:
        prefix_key, prefix_value, seen = joined_per_example(prefixes, batch, batch.times(query, module))
        length = seen.shape[1]
        mask = _mask(module, implementation, query, key, attention_mask, 0, kwargs)
        # Each example sees another part of the padded prefixes, so a mask is needed even if the model passes none.
        if mask is None:
            mask = query.new_zeros(1, 1, query.shape[-2], key.shape[-2])
        mask = widen_per_example(mask, seen)
    # 14 models pass a bias for relative positions apart from the mask (T5). A prefix has no position, so its bias is 0, but
    # for `front`.
    if isinstance(kwargs.get("position_bias"), Tensor):
        kwargs["position_bias"] = widen(kwargs["position_bias"], length, front)
    key, value = prepend(prefix_key, key, module), prepend(prefix_value, value, module)
    output, weights, *rest = kernel(module, query, key, value, mask, *args, **kwargs)
    if isinstance(weights, Tensor) and weights.shape[-1] == key.shape[-2]:
        # Callers that asked for attention weights expect one column for each token.
        weights = weights[..., length:]
    return (output, weights, *rest)


def _refuse(module: nn.Module, implementation: str, mask: Any, kwargs: dict[str, Any]) -> None:
    found = next((name for name in _KEY_ADDRESSES if kwargs.get(name) is not None), None)
    # Flash attention counts its window from the query, so it would cut the prefix off.
    if "flash" in implementation and kwargs.get("sliding_window") is not None:
        found = "sliding_window with flash attention"
    if mask is not None and not isinstance(mask, Tensor):
        found = f"a mask of type {type(mask).__name__}"
    if found is not None:
        raise StateError(
            f"{type(module).__name__}: a prefix cannot be added to attention with {found}; load the model with "
            "attn_implementation='sdpa' or 'eager', or omit this module with exclude="
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
    # Without a mask, only the sdpa kernel is causal on its own (transformers' sdpa_attention.py). It aligns its mask to the
    # upper left corner, where a prefix would hide the last keys, so the mask is written out.
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if implementation == "sdpa" and is_causal and query.shape[-2] > 1:
        return causal(query.shape[-2], key.shape[-2], length, query.device)[None, None]
    return None
