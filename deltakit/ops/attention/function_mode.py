"""Prefixes in attention that does not go through transformers' interface.

For the time of the attention module's forward, torch's own functions are watched: `scaled_dot_product_attention`, or a
softmax attention written out, from the product of queries and keys to the product of probabilities and values.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from deltakit.errors import StateError
from deltakit.ops.attention.kernel import causal, prepend, widen, widen_per_example

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_PRODUCTS_ADDED = (torch.baddbmm, Tensor.baddbmm)
_HIDING = (torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__, torch.sub, Tensor.sub)
_SHAPINGS = (Tensor.view, Tensor.reshape, torch.reshape)


class PrefixMode(TorchFunctionMode):
    """Watches one forward of one attention module. `finished` counts the attentions that got the prefix.

    `key` and `value` are [heads, prefix, d], or [rows, heads, prefix, d] for rows with prefixes of their own; then `seen` says
    which places of them a row sees.
    """

    def __init__(self, module: nn.Module, key: Tensor, value: Tensor, seen: Tensor | None = None) -> None:
        super().__init__()
        self.module, self.key, self.value, self.seen = module, key, value, seen
        self.length = key.shape[-2]
        self.keys: int | None = None
        """The number of the module's own keys, between the two products of an attention written out."""
        self.attended: int | None = None
        """The number of keys of the last attention written out that is done."""
        self.finished = 0

    def check(self) -> None:
        """Checks that the forward attended with the prefix.

        Raises:
            StateError: if no attention was recognised, or one was not recognised to its end.
        """
        if self.finished and self.keys is None:
            return
        raise StateError(
            f"{type(self.module).__name__}: its forward holds no attention that a prefix could enter (a call of "
            "scaled_dot_product_attention, or softmax(q k^T) v written out); leave this module out with exclude="
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _BARE_MULTI_HEAD(*args, **kwargs)
        if func in _PRODUCTS_ADDED:
            return self._added_product(func, *args, **kwargs)
        if func in _PRODUCTS and len(args) == 2:
            return self._product(func, *args)
        if self.keys is not None:
            args = self._widened(func, args)
        elif func in _SHAPINGS:
            args = self._as_returned(args)
        return func(*args, **kwargs)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        length = self.length if self.seen is None else 0
        if is_causal:
            attn_mask = causal(query.shape[-2], key.shape[-2], length, query.device)
        elif attn_mask is not None:
            attn_mask = widen(attn_mask, length)
        if self.seen is not None:
            attn_mask = query.new_zeros(query.shape[-2], key.shape[-2]) if attn_mask is None else attn_mask
            attn_mask = widen_per_example(attn_mask[(None,) * (4 - attn_mask.ndim)], self.seen)
            attn_mask = attn_mask.squeeze(1) if query.ndim == 3 else attn_mask
        self.finished += 1
        key, value = prepend(self.key, key, self.module), prepend(self.value, value, self.module)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)

    def _product(self, func: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
        if self._is_scores(a, b):
            self.keys = b.shape[-1]
            return self._hidden(func(a, prepend(self.key, b.transpose(-1, -2), self.module).transpose(-1, -2)))
        if self._is_mixing(a, b):
            self.attended, self.keys = self.keys, None
            self.finished += 1
            return func(a, prepend(self.value, b, self.module))
        return func(a, b)

    def _added_product(
        self, func: Any, bias: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        scores = self._is_scores(batch1, batch2)
        if scores:
            self.keys = batch2.shape[-1]
            batch2 = prepend(self.key, batch2.transpose(-1, -2), self.module).transpose(-1, -2)
            if bias.shape[-1] == self.keys:
                bias = widen(bias, self.length)
        product = func(bias, batch1, batch2, beta=beta, alpha=alpha)
        return self._hidden(product) if scores else product

    def _hidden(self, scores: Tensor) -> Tensor:
        """The scores, with those of places that a row does not see as low as there are."""
        if self.seen is None:
            return scores
        whole = scores if scores.ndim == 4 else scores.unflatten(0, (self.seen.shape[0], -1))
        front = whole[..., : self.length].masked_fill(~self.seen[:, None, None], torch.finfo(scores.dtype).min)
        return torch.cat([front, whole[..., self.length :]], -1).view(scores.shape)

    def _is_scores(self, a: Any, b: Any) -> bool:
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim >= 3 and b.ndim >= 3
        return self.keys is None and tensors and a.shape[-1] == b.shape[-2] == self.key.shape[-1]

    def _is_mixing(self, a: Tensor, b: Tensor) -> bool:
        return self.keys is not None and a.shape[-1] == self.keys + self.length and b.shape[-2] == self.keys

    def _widened(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a function of the scores, masks and biases as wide as the scores are now."""
        if func in _SHAPINGS:
            return self._reshaped(args)
        wide = [isinstance(x, Tensor) and x.ndim > 0 and x.shape[-1] == self._both for x in args]
        if not any(wide):
            return args
        if func in _HIDING:
            return tuple(widen(x, self.length, visible=False) if self._narrow(x) else x for x in args)
        if func is torch.where:
            return (widen(args[0], self.length, visible=wide[1]) if self._narrow(args[0]) else args[0], *args[1:])
        if func in _SUMS:
            return tuple(widen(x, self.length) if self._narrow(x) else x for x in args)
        return args

    @property
    def _both(self) -> int:
        return (self.keys or 0) + self.length

    def _narrow(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and x.shape[-1] == self.keys

    def _reshaped(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *sizes = args
        if x.shape[-1] != self._both or not sizes:
            return args
        flat = list(sizes[0]) if isinstance(sizes[0], tuple | list | torch.Size) else sizes
        return (x, *flat[:-1], self._both if flat[-1] == self.keys else flat[-1])

    def _as_returned(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The attention weights as the caller expects them: without the prefix's columns."""
        x, *sizes = args
        last = sizes[-1][-1] if sizes and isinstance(sizes[-1], tuple | list) else sizes[-1] if sizes else None
        if self.attended is not None and last == self.attended and x.shape[-1] == self.attended + self.length:
            return (x[..., self.length :].contiguous(), *sizes)
        return args


def current_prefix_mode(module: nn.Module) -> PrefixMode | None:
    """The mode that watches the forward of a module now: torch's own stack of modes holds it, for this thread and call."""
    mode = _get_current_function_mode()
    return mode if isinstance(mode, PrefixMode) and mode.module is module else None


# torch's own code, run under the mode instead of being handed to it as one call.
_BARE_MULTI_HEAD = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda *_: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
