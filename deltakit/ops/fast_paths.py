"""When the fast paths for linear layers may be taken: those of `low_rank`, `recompute` and `sparse_product`.

Two questions come up again: whether a tensor, a mode or a transform allows only the plain formula; and whether a target's
output is what torch's own layer computed, so that it may be changed in place, or share an autograd node with the update.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from deltakit.core import is_exactly_conv1d

AFTER_ALL = torch.nn.modules.module._global_forward_hooks
"""torch's hooks that run after all modules. They run before a module's own hooks, and may keep or replace its output."""
BEFORE_ALL = torch.nn.modules.module._global_forward_pre_hooks
"""torch's hooks that run before all modules, also before delta modules if their `__call__` is used."""

# Module-level names save attribute lookups: they are called in every call of every target. torch has no public function that
# tells whether a functional transform is active. `torch.is_autocast_enabled(y.device.type)` takes 660 ns, and this 140 ns.
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch.jit.is_tracing  # type: ignore[attr-defined]
_autocast, _transforms = torch._C._is_any_autocast_enabled, torch._C._are_functorch_transforms_active
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
# Where `nn.Linear` and transformers' `Conv1D` are defined.
_FILES = ("linear.py", "pytorch_utils.py")


def only_plain(x: Tensor, y: Tensor, a: Tensor) -> bool:
    """Returns whether only the plain formula works for an input, an output and a parameter."""
    # Tensor subclasses (DTensor, quantized ones) and transforms do not support in-place sums in a custom autograd function.
    # A y that is not contiguous cannot be viewed as [tokens, d_out]. A dispatch mode may keep the layer's output, which then
    # must not change: selective checkpointing keeps the results of matrix products.
    return (
        _is_compiling()
        or type(x) is not Tensor
        or type(y) is not Tensor
        or type(a) not in (nn.Parameter, Tensor)
        or x.dtype is not y.dtype
        or x.is_complex()
        or not is_dense(x)
        or not y.is_contiguous()
        or _autocast()
        or _transforms()
        or _dispatch_modes() > 0
        or _is_tracing()
        or forward_ad._current_level >= 0
    )


def is_dense(x: Tensor) -> bool:
    """Returns whether a tensor is neither sparse nor nested. Only the plain formula works for those."""
    return x.layout is torch.strided and not x.is_nested


def hooked_everywhere() -> bool:
    """Returns whether torch has hooks for the forwards of all modules, which only `__call__` runs."""
    return bool(BEFORE_ALL or AFTER_ALL)


def must_copy() -> bool:
    """Returns whether a product must not be added to a layer's output in place, whoever made that output.

    A dispatch mode sees the results of all operations, and may keep them; autocast does not cast for operations in place; and
    compiled code gains nothing by them.
    """
    return _is_compiling() or _dispatch_modes() > 0 or _autocast()


def frozen_weight(layer: nn.Module | None, x: Tensor, y: Tensor) -> Tensor | None:
    """Returns the layer's weight if one autograd node can serve both layer and delta, else None."""
    # The node replaces y's history by x, so y must depend on nothing else that requires gradients.
    if layer is None or not (x.requires_grad or not y.requires_grad) or not _computes_as_torch(layer):
        return None
    if "weight" in layer.__dict__ or "bias" in layer.__dict__:
        # A weight patch of another delta is in place, and needs gradients through y.
        return None
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype is not x.dtype:
        return None
    return weight if bias is None or not bias.requires_grad else None


def _computes_as_torch(layer: nn.Module) -> bool:
    """Returns whether nobody has replaced the code of all linear layers: their class's `forward`, or `F.linear`.

    Quantizers of activations do, and modes of torch functions. What the layer then computes is its input's function no more.
    """
    # By the name of the file, because it may have been replaced before deltakit was imported.
    code = getattr(type(layer).forward, "__code__", None)
    if code is None or not code.co_filename.endswith(_FILES) or F.linear is not torch._C._nn.linear:
        return False
    return not _function_modes() or all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def fresh(target: nn.Module, delta: nn.Module) -> tuple[nn.Module | None, bool]:
    """Returns the target if its output may be changed in place, else None; and whether the output is the layer's own.

    It must be a plain linear layer, and no other hook may have run before the delta's: it may keep the output or have
    replaced it. Only other low-rank deltas may come before.
    """
    own = target.__dict__
    if not (type(target) is nn.Linear or is_exactly_conv1d(target)) or "forward" in own or AFTER_ALL:
        return None, False
    keys: tuple[str, ...] = ()
    alone = True
    # The first hook. Not by `next`: torch 2.6 cannot trace it with a default, and another thread may change the table between
    # two calls, but not in the head of a loop.
    for hook in own["_forward_hooks"].values():
        keys = getattr(hook, "delta_keys", ())
        break
    for key in keys:
        held = own["_modules"].get(key)
        if held is delta:
            return target, alone
        # A hook of its own may keep what it returns.
        if type(held) is not type(delta) or held._forward_hooks:
            break
        alone = False
    return None, False


def own_output(target: nn.Module, delta: nn.Module) -> bool:
    """Returns whether the output that a delta module gets is exactly what the target computes from its bare weight."""
    # As in `fresh`. Other linear layers than nn.Linear, convolutions and embeddings count here: nothing is changed in place.
    if "forward" in target.__dict__ or "weight" in target.__dict__ or "bias" in target.__dict__ or AFTER_ALL:
        return False
    for hook in target._forward_hooks.values():
        keys = getattr(hook, "delta_keys", ())
        return bool(keys) and target._modules.get(keys[0]) is delta
    return False
