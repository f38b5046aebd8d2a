"""Adds LoRA's product to the output for a few tokens without gradients, as in decoding.

There the calls cost more than the arithmetic: on a layer of 64 features the two products take 7 us, and asking the same
questions in several functions took 4 us more. So all of them stand in one function, each attribute is read once, and what
torch answers slowly is asked in another way (`numel()` takes 60 ns and `shape` 250).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from deltakit.ops.low_rank import BEFORE_ALL, fresh

# The largest number of tokens.
_FEW = 16
# Module-level names save attribute lookups. See `low_rank` for the questions.
_graph, _is_tracing = torch.is_grad_enabled, torch._C._is_tracing
_transforms, _dispatch_modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
_float32, _float64 = torch.float32, torch.float64
_PLAIN = (nn.Parameter, Tensor)


def add_few_tokens(target: nn.Module, delta: Any, x: Any, y: Any) -> Float[Tensor, "*batch d_out"] | None:
    """Adds the product of the delta's factors to y in place, for a few tokens without gradients (decoding).

    The caller asks before whether code is being compiled: dynamo would guard on the number of tokens, and compile once more.

    Args:
        x, y: the input [*batch, d_in] and the output [*batch, d_out] of a linear layer. What is no tensor is left alone.

    Returns:
        y, or None if a condition is not met and the caller must use `low_rank.add_low_rank`.
    """
    # The conditions that fail most often come first. But tracing is checked before the number of tokens, because a trace would
    # contain that number.
    if _graph() or _is_tracing() or type(x) is not Tensor or type(y) is not Tensor:
        return None
    # An attribute of a module takes 50 ns, and one that is read from its `__dict__` 15. But a class of the user may compute
    # `d_in`, `dropout` and `scaling`.
    own = delta.__dict__
    size, width = x.numel(), delta.d_in
    if size > _FEW * width or own["layer_kind"] == "slice" or (delta.dropout and own["training"]):
        return None
    # Hooks of FSDP2 and accelerate, which only `__call__` runs. `fresh` asks for those that run after all modules.
    if own["_forward_pre_hooks"] or own["_forward_hooks"] or BEFORE_ALL or "forward" in own:
        return None
    a, b = delta.factors()
    dtype = x.dtype
    # Autocast need not be asked: it would have given y another dtype than x's, or has nothing to cast.
    if y.dtype is not dtype or a.dtype is not dtype or b.dtype is not dtype:
        return None
    if type(a) not in _PLAIN or not y.is_contiguous():
        return None
    if _transforms() or _dispatch_modes() or forward_ad._current_level >= 0 or fresh(target, delta)[0] is None:
        return None
    record, scale = own["record"], delta.scaling
    if record is not None:
        scale *= record.scale
    if size == width and (dtype is _float32 or dtype is _float64):
        # One token: two products with vectors take 6.0 us where the line below takes 9.2 (768 features). In 16 bits they are
        # slower. `ravel` takes 0.6 us, and `view` 0.8.
        y.ravel().addmv_(b, a.mv(x.ravel()), alpha=scale)
        return y
    return y.add_(F.linear(F.linear(x, a), b), alpha=scale)
