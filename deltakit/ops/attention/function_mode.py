"""Prefixes in attention that does not use transformers' interface (BLOOM, GPT-J, DeBERTa, MPT, plain torch).

A prefix enters between projections and softmax, where there is no module to hook. So torch's own functions are intercepted
while the attention module's forward runs. Two forms of attention are recognised:

- A call of `scaled_dot_product_attention`: the prefix is put ahead of its keys and values.
- Attention written out. It starts with a product of queries and keys (the scores), which gets more columns. Until the
  product of probabilities and values, masks and biases that are combined with the scores get the same columns.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltakit.core import RunningCall
from deltakit.errors import StateError
from deltakit.ops.attention.kernel import causal, prepend, widen, widen_per_example

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_PRODUCTS_ADDED = (torch.baddbmm, Tensor.baddbmm)
_MASKING = (torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__, torch.sub, Tensor.sub)
# Forwards reshape scores with sizes that they computed before, so those sizes need the new number of columns.
_SHAPINGS = (Tensor.view, Tensor.reshape, torch.reshape)
_ATTENTIONS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
# One look-up for the many functions that the mode leaves as they are.
_CONCERNED = frozenset(
    (*_ATTENTIONS, *_PRODUCTS, *_PRODUCTS_ADDED, *_MASKING, *_SUMS, *_SHAPINGS, torch.where)
)  # fmt: skip


class PrefixMode(TorchFunctionMode):
    """Adds a prefix to the attention in one forward of one module, while the mode is entered.

    `finished` counts the attentions that got the prefix. DiffLlama attends twice in a forward, so one is not enough.

    Args:
        module: the attention module, for its class name in errors.
        key: the prefix's keys: one set for all examples, or one for each example in the first dimension.
        value: the prefix's values, likewise.
        seen: which positions of its prefix each example sees; None if every query sees all of them.
        front: what is added to the scores of the prefix where a bias is added to the others; None for zeros.
    """

    def __init__(
        self,
        module: nn.Module,
        key: Float[Tensor, "*examples heads prefix d_k"],
        value: Float[Tensor, "*examples heads prefix d_v"],
        seen: Bool[Tensor, "*examples prefix"] | None = None,
        front: Float[Tensor, "one heads queries prefix"] | None = None,
    ) -> None:
        super().__init__()
        self.call: RunningCall | None = None
        """The call of the module. After it the mode changes nothing: Ctrl-C may have left it on torch's stack."""
        self.module, self.key, self.value, self.seen, self.front = module, key, value, seen, front
        self.length = key.shape[-2]
        self.keys: int | None = None
        """The number of the module's own keys while its scores are being turned into probabilities, else None."""
        self.attended: int | None = None
        """The number of own keys of the last attention that was written out and is finished."""
        self.finished = 0

    @property
    def over(self) -> bool:
        """Whether the forward that it was entered for has ended."""
        return self.call is not None and self.call.over

    def check(self) -> None:
        """Checks after a forward that its attention got the prefix.

        Without this check an unknown form of attention would silently run without the prefix.

        Raises:
            StateError: if no attention was recognised, or only the start of one.
        """
        if self.finished and self.keys is None:
            return
        raise StateError(
            f"{type(self.module).__name__}: no attention was found in its forward that a prefix can be added to: expected a "
            "call of scaled_dot_product_attention, or softmax(q k^T) v written out; omit this module with exclude="
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CONCERNED or self.over:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Torch hands the whole function to the mode as one call. Entering the mode again while its plain code runs
            # makes the products inside visible.
            with self:
                return _BARE_MULTI_HEAD(*args, **kwargs)
        if func in _PRODUCTS_ADDED:
            return self._added_product(func, *args, **kwargs)
        if func in _PRODUCTS and len(args) == 2:
            return self._product(func, *args)
        # Everything else matters only between the two products, and for the returned weights after them.
        if self.keys is not None:
            args = self._widened(func, args)
        elif func in _SHAPINGS:
            args = self._as_returned(args)
        return func(*args, **kwargs)

    def _fused(
        self,
        query: Float[Tensor, "*query_batch queries d_k"],
        key: Float[Tensor, "*batch keys d_k"],
        value: Float[Tensor, "*batch keys d_v"],
        attn_mask: Shaped[Tensor, "*mask_batch keys"] | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        # With per-example prefixes the mask gets its columns at once from `seen`, so the others add none.
        length = self.length if self.seen is None else 0
        # `is_causal` lets query i see the first i + 1 columns, which would be mostly the prefix's. So the mask is written
        # out, and the flag is not passed on.
        if is_causal:
            attn_mask = causal(query.shape[-2], key.shape[-2], length, query.device)
        elif attn_mask is not None:
            attn_mask = widen(attn_mask, length)
        if self.seen is not None:
            attn_mask = query.new_zeros(query.shape[-2], key.shape[-2]) if attn_mask is None else attn_mask
            attn_mask = widen_per_example(attn_mask[(None,) * (4 - attn_mask.ndim)], self.seen)
            attn_mask = attn_mask.squeeze(1) if query.ndim == 3 else attn_mask  # [examples, seq, d] has no heads
        self.finished += 1
        key, value = prepend(self.key, key, self.module), prepend(self.value, value, self.module)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)

    def _product(self, func: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
        """A matrix product: with more keys if it makes scores, with more values if it mixes values, else as it is."""
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
        # BLOOM adds its ALiBi bias to the scores in one call of baddbmm, and the bias may need the columns as well.
        scores = self._is_scores(batch1, batch2)
        if scores:
            self.keys = batch2.shape[-1]
            batch2 = prepend(self.key, batch2.transpose(-1, -2), self.module).transpose(-1, -2)
            if bias.shape[-1] == self.keys:
                bias = widen(bias, self.length)
        product = func(bias, batch1, batch2, beta=beta, alpha=alpha)
        return self._hidden(product) if scores else product

    def _hidden(self, scores: Float[Tensor, "*batch queries both"]) -> Float[Tensor, "*batch queries both"]:
        """The scores, with the lowest finite number at prefix positions that an example does not see.

        Minus infinity would give NaN in rows that see nothing.
        """
        if self.seen is None:
            return scores
        whole = scores if scores.ndim == 4 else scores.unflatten(0, (self.seen.shape[0], -1))
        front = whole[..., : self.length].masked_fill(~self.seen[:, None, None], torch.finfo(scores.dtype).min)
        return torch.cat([front, whole[..., self.length :]], -1).view(scores.shape)

    def _is_scores(self, a: Any, b: Any) -> bool:
        # The first product over the size of one head, outside another attention. Projections multiply by the hidden size.
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim >= 3 and b.ndim >= 3
        return self.keys is None and tensors and a.shape[-1] == b.shape[-2] == self.key.shape[-1]

    def _is_mixing(self, a: Tensor, b: Tensor) -> bool:
        # Probabilities have a column for each key of both kinds, values only a row for each own key.
        return self.keys is not None and a.shape[-1] == self.keys + self.length and b.shape[-2] == self.keys

    def _widened(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a function, with masks and biases widened if one of the others has the scores' width."""
        if func in _SHAPINGS:
            return self._reshaped(args)
        wide = [isinstance(x, Tensor) and x.ndim > 0 and x.shape[-1] == self._both for x in args]
        if not any(wide):
            return args
        if func in _MASKING:
            return tuple(widen(x, self.length, visible=False) if self._narrow(x) else x for x in args)
        # `where(mask, scores, low)` shows the scores where the mask is True, `where(mask, low, scores)` where it is False.
        if func is torch.where:
            return (widen(args[0], self.length, visible=wide[1]) if self._narrow(args[0]) else args[0], *args[1:])
        if func in _SUMS:
            return tuple(widen(x, self.length, self.front) if self._narrow(x) else x for x in args)
        return args

    @property
    def _both(self) -> int:
        """The number of columns of the scores: the prefix's and the own keys'."""
        return (self.keys or 0) + self.length

    def _narrow(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and x.shape[-1] == self.keys

    def _reshaped(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a reshape of scores, with the new number of columns instead of the old one."""
        x, *sizes = args
        if x.shape[-1] != self._both or not sizes:
            return args
        flat = list(sizes[0]) if isinstance(sizes[0], tuple | list | torch.Size) else sizes
        return (x, *flat[:-1], self._both if flat[-1] == self.keys else flat[-1])

    def _as_returned(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a reshape of returned attention weights, without the prefix's columns.

        `F.multi_head_attention_forward` averages the weights over heads after such a reshape.
        """
        x, *sizes = args
        last = sizes[-1][-1] if sizes and isinstance(sizes[-1], tuple | list) else sizes[-1] if sizes else None
        if self.attended is not None and last == self.attended and x.shape[-1] == self.attended + self.length:
            return (x[..., self.length :].contiguous(), *sizes)
        return args


# Torch's own code, with the check removed that hands the whole call to a mode before anything runs.
_BARE_MULTI_HEAD = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda *_: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
