"""Which modules of a backbone attend, and with which sizes: read from the code of their forward and from their layers."""

import dis
import inspect
from dataclasses import dataclass

import torch
from torch import nn

from deltakit.core import Target, linear_sizes
from deltakit.errors import TargetError
from deltakit.selection import FUSED, FUSED_KV, PROJECTIONS, says_attention

_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads")
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "dim_head", "d_kv")
_PRODUCTS = {"matmul", "bmm", "baddbmm"}


@dataclass(frozen=True)
class Heads:
    """The keys and values of an attention module: heads, and the size of one in each."""

    count: int
    d_key: int
    d_value: int


def enters_by_interface(module: nn.Module) -> bool:
    """Whether a module attends through transformers' attention interface."""
    return "get_interface" in _names(module)


def attends(module: nn.Module) -> bool:
    """Whether a module's own forward attends, by the interface, by torch's attention, or written out."""
    names = _names(module)
    if isinstance(module, nn.MultiheadAttention) or names & {"get_interface", "scaled_dot_product_attention"}:
        return True
    if "multi_head_attention_forward" in names:
        return True
    written_out = any("softmax" in name.lower() for name in names) and bool(names & _PRODUCTS)
    return says_attention(type(module).__name__) and written_out


def _names(module: nn.Module) -> set[str]:
    """The names that a module's forward uses, and those of the methods of its own that it calls."""
    kind = type(module)
    found = _code_names(kind.forward)
    for name in set(found):
        method = getattr(kind, name, None)
        if inspect.isfunction(method) and not method.__module__.startswith("torch."):
            found = found | _code_names(method)
    return found


def _code_names(function: object) -> set[str]:
    code = getattr(inspect.unwrap(function), "__code__", None)  # type: ignore[arg-type]
    if code is None:
        return set()
    # `a @ b` is an instruction of its own and no name.
    operators = {
        "matmul" for step in dis.get_instructions(code) if "MATRIX_MULTIPLY" in step.opname or step.argrepr == "@"
    }
    return {*code.co_names, *operators}


def heads_of(target: Target) -> Heads:
    """The sizes of the keys and values of an attention module, from its attributes and its projections.

    Raises:
        TargetError: if they do not tell.
    """
    module = target.module
    heads, size = _first(module, _HEADS), _first(module, _HEAD_SIZES)
    if isinstance(module, nn.MultiheadAttention):
        return Heads(module.num_heads, module.head_dim, module.head_dim)
    latent = _first(module, ("qk_head_dim",)), _first(module, ("v_head_dim",))
    if heads and latent[0] and latent[1]:
        return Heads(heads, latent[0], latent[1])
    outs = {name.lower(): s[1] for name, child in module.named_children() if (s := linear_sizes(child)) is not None}
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
        f"{target.path}: cannot tell the heads of this {type(module).__name__}: expected attributes such as num_heads "
        "and head_dim and layers such as k_proj and v_proj, or qkv; leave it out with exclude="
    )


def _at_the_interface(module: nn.Module, heads: int | None, projected: int) -> int:
    """The heads of keys where they meet the queries: JetMoE repeats them ahead of that, and says that none is shared."""
    groups = getattr(module, "num_key_value_groups", None)
    return heads if heads and groups == 1 and heads % projected == 0 else projected


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, torch.Tensor | bool):
                return value
    return None
