"""The output hook of low-rank updates: for a few tokens without gradients, as in decoding, it adds the products itself.

There the calls cost more than the arithmetic: on a layer of 64 features the two products take 7 us. Between two calls of one
target the model has read all its weights, so Python's own objects are no longer in the cache, and each call, attribute and
question takes several times as long as in a loop. `OutputHook` asks the same with four more calls, and with that LoRA took a
sixth longer on GPT-2 and BERT (measured, one token). So nearly all questions stand in one function, and each attribute is
read once.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from deltakit.core import NO_OUTPUT, OutputHook, is_exactly_conv1d, is_traced
from deltakit.ops.fast_paths import AFTER_ALL, BEFORE_ALL

# The largest number of tokens.
_FEW = 16
# Module-level names save attribute lookups. See `fast_paths` for the questions.
_graph, _is_tracing = torch.is_grad_enabled, torch._C._is_tracing
_transforms, _dispatch_modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
_float32, _float64, _strided, _Linear = torch.float32, torch.float64, torch.strided, nn.Linear
_PLAIN = (nn.Parameter, Tensor)
WHOLE_LAYERS: Final = ("linear", "product")
"""The values of `LowRank.layer_kind` for linear layers without feature slices."""


class FewTokensHook(OutputHook):
    """Does what `LowRank.after_call` does, for a few tokens without gradients, in place.

    Where a condition is not met, it calls this delta module and all behind it as `OutputHook` does.
    """

    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = NO_OUTPUT) -> Any:
        # Tracing is asked before the number of tokens: a trace would contain that, and dynamo would compile again for another.
        if is_traced() or _graph() or _is_tracing() or not args or not _may_change(self, target, args[0], output):
            return OutputHook.__call__(self, target, args, kwargs, output)
        x, keys, children = args[0], self.delta_keys, target.__dict__["_modules"]
        size, dtype = x.numel(), x.dtype
        self.fired = True
        for key in keys:
            delta: Any = children.get(key)
            if delta is None:
                continue
            # An attribute of a module takes 50 ns, and one that is read from its `__dict__` 15. But a class of the user may
            # compute `d_in`, `dropout` and `scaling`.
            own = delta.__dict__
            record, scale = own["record"], 1.0
            if record is not None:
                if not record.active or record.weights_before_merge:
                    continue
                if record.has_rows:
                    break
                scale = record.scale
            if type(delta).output_hook is not FewTokensHook:
                break
            width = delta.d_in
            if size > _FEW * width or own["layer_kind"] not in WHOLE_LAYERS or (delta.dropout and own["training"]):
                break
            # Hooks of FSDP2 and accelerate, which only `__call__` runs, and what replaces a method.
            if own["_forward_pre_hooks"] or own["_forward_hooks"] or "forward" in own or "after_call" in own:
                break
            a, b = delta.factors()
            if a.dtype is not dtype or b.dtype is not dtype or type(a) not in _PLAIN:
                break
            single = size == width and (dtype is _float32 or dtype is _float64)
            if single and x.layout is _strided and not x.is_nested:
                # One token: two products with vectors take 6.0 us where the line below takes 9.2 (768 features). In 16 bits
                # they are slower. `ravel` takes 0.6 us, and `view` 0.8.
                output.ravel().addmv_(b, a.mv(x.ravel()), alpha=delta.scaling * scale)
            else:
                output.add_(F.linear(F.linear(x, a), b), alpha=delta.scaling * scale)
        else:
            return output
        return self.call_deltas(keys[keys.index(key) :], target, args, kwargs, output)


def _may_change(hook: FewTokensHook, target: nn.Module, x: Any, y: Any) -> bool:
    """Returns whether y may be changed in place.

    It must be the output of a plain linear layer that no other hook has seen, and no mode or transform may be active. These
    are questions of `fast_paths.fresh` and `fast_paths.only_plain`, here in one call.
    """
    own = target.__dict__
    first: Any = None
    # Not by `next`, because another thread may change the table between two calls, but not in the head of a loop.
    for first in own["_forward_hooks"].values():  # noqa: B007
        break
    if first is not hook or not (type(target) is _Linear or is_exactly_conv1d(target)) or "forward" in own:
        return False
    # Hooks for all modules also run ahead of and behind delta modules, but only in their `__call__`.
    if BEFORE_ALL or AFTER_ALL or type(x) is not Tensor or type(y) is not Tensor:
        return False
    if y.dtype is not x.dtype or not y.is_contiguous():
        return False
    # Autocast need not be asked: it would have given y another dtype than x's, or has nothing to cast.
    return not (_transforms() or _dispatch_modes() or forward_ad._current_level >= 0)
