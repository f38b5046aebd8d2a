"""Finds the attention modules of a backbone and the sizes of their keys and values.

The code of a forward shows whether it attends; attributes and layers show the sizes.
"""

import dis
import inspect
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType

import torch
from torch import nn

from deltakit.core import Target, linear_sizes, own_children
from deltakit.errors import TargetError
from deltakit.selection import FUSED, FUSED_KV, PROJECTIONS, says_attention

_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads")
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "dim_head", "d_kv")
_PRODUCTS = {"matmul", "bmm", "baddbmm"}
# transformers' interface, torch's function, and diffusers' function, which calls torch's by default.
_FUNCTIONS = {"get_interface", "scaled_dot_product_attention", "dispatch_attention_fn"}


@dataclass(frozen=True)
class Heads:
    """The number of heads of an attention module's keys and values, and the sizes of one key and one value."""

    count: int
    d_key: int
    d_value: int


def enters_by_interface(module: nn.Module) -> bool:
    """Returns whether a module attends through transformers' attention interface."""
    return "get_interface" in _names(module)


def calls_fused_attention(module: nn.Module) -> bool:
    """Returns whether a module attends through torch's `scaled_dot_product_attention`, called in Python."""
    return "scaled_dot_product_attention" in _names(module) and not isinstance(module, nn.MultiheadAttention)


def attends(module: nn.Module) -> bool:
    """Returns whether a module's own forward attends: by the interface, by torch's attention, or written out."""
    names = _names(module)
    if isinstance(module, nn.MultiheadAttention) or names & _FUNCTIONS:
        return True
    if "multi_head_attention_forward" in names:
        return True
    # A softmax between two products also occurs outside attention (routers of experts), so the class name must agree.
    written_out = any("softmax" in name.lower() for name in names) and bool(names & _PRODUCTS)
    return says_attention(type(module).__name__) and written_out


def _names(module: nn.Module) -> frozenset[str]:
    """The names that a module's forward uses, and those in the methods and helper objects that it calls."""
    kind = type(module)
    found = _code_names(kind.forward)
    for name in found:
        method = getattr(kind, name, None)
        if inspect.isfunction(method) and not method.__module__.startswith("torch."):
            found = found | _code_names(method)
        # The attention of diffusers is computed by its `processor`, which is no module.
        helper = vars(module).get(name)
        if callable(helper) and not isinstance(helper, type):
            found = found | _code_names(type(helper).__call__)
    return found


def _code_names(function: object) -> frozenset[str]:
    code = getattr(inspect.unwrap(function), "__code__", None)  # type: ignore[arg-type]
    return _names_in(code) if code is not None else frozenset()


# All layers of a model share the code of their class. Without a cache, attaching to 24 layers read each one 45 times.
@lru_cache(4096)
def _names_in(code: CodeType) -> frozenset[str]:
    # `a @ b` is a byte-code instruction and not a name.
    operators = {
        "matmul" for step in dis.get_instructions(code) if "MATRIX_MULTIPLY" in step.opname or step.argrepr == "@"
    }
    return frozenset(code.co_names) | operators


def heads_of(target: Target) -> Heads:
    """Returns the sizes of the keys and values of an attention module.

    Raises:
        TargetError: if its attributes and projections do not show them.
    """
    module = target.module
    heads, size = _first(module, _HEADS), _first(module, _HEAD_SIZES)
    if isinstance(module, nn.MultiheadAttention):
        return Heads(module.num_heads, module.head_dim, module.head_dim)
    # Latent attention (DeepSeek-V2) has keys and values of different sizes, and no projection with either size.
    latent = _first(module, ("qk_head_dim",)), _first(module, ("v_head_dim",))
    if heads and latent[0] and latent[1]:
        return Heads(heads, latent[0], latent[1])
    outs = {name.lower(): s[1] for name, child in own_children(module) if (s := linear_sizes(child)) is not None}
    key, value = (next((outs[n] for n in outs if n in PROJECTIONS[letter]), None) for letter in "kv")
    kv = next((outs[name] for name in outs if name in FUSED_KV - FUSED), None)
    fused = next((outs[name] for name in outs if name in FUSED), None)
    if kv and not key:
        key = value = kv // 2
    if key and value and (size or heads):
        size = size or key // (heads or 1)
        if count := key // size:
            return Heads(_at_the_interface(module, heads, count), size, value // count)
    if fused and heads:
        size = size or fused // (3 * heads)
        return Heads(_first(module, _KV_HEADS) or heads, size, size)
    raise TargetError(
        f"{target.named}: the number and size of heads of this {type(module).__name__} cannot be determined: expected "
        "attributes such as num_heads and head_dim, and layers such as k_proj and v_proj, or qkv; omit it with exclude="
    )


def input_width(target: Target) -> int:
    """Returns the number of features that enter an attention module.

    Raises:
        TargetError: if its projection to queries and the block around it do not show the number.
    """
    module = target.module
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    ins = {name.lower(): s[0] for name, child in own_children(module) if (s := linear_sizes(child)) is not None}
    width = next((ins[name] for name in ins if name in PROJECTIONS["q"] | FUSED), None) or target.width
    if width is None:
        raise TargetError(
            f"{target.named}: the number of features that enter this {type(module).__name__} cannot be determined: expected "
            "a layer such as q_proj or qkv; use gate=False, or omit it with exclude="
        )
    return width


def _at_the_interface(module: nn.Module, heads: int | None, projected: int) -> int:
    """The number of key heads when they meet the queries. JetMoE repeats its keys before that call, with groups of 1."""
    groups = getattr(module, "num_key_value_groups", None)
    return heads if heads and groups == 1 and heads % projected == 0 else projected


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, torch.Tensor | bool):
                return value
    return None
