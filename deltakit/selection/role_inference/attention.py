"""Finds attention by structure: projections to queries, keys and values that are siblings, or one that fuses them."""

from collections.abc import Iterator, Mapping

from torch import nn

from deltakit.core import above, join, name_of, parent_of
from deltakit.selection.role_inference.names import (
    AFFIXED,
    FUSED,
    FUSED_KV,
    KEYED,
    LATENT,
    OUTPUTS,
    PROJECTIONS,
    says_attention,
)
from deltakit.selection.role_inference.role_map import Unit
from deltakit.selection.role_inference.walk import Walk


def attention_units(walk: Walk) -> Iterator[Unit]:
    """Yields the attention units of a backbone, each with the projections that are certain."""
    around: set[str] = set()
    for path in reversed(walk.modules):
        module = walk.modules[path]
        if isinstance(module, nn.MultiheadAttention):
            around.update(above(parent_of(path)))
            yield _torch_unit(path, module)
            continue
        says = says_attention(type(module).__name__)
        names = walk.names(path)
        parts = _projections(names, says)
        inside = path and path in around
        if (inside and "q" not in parts) or not (parts or says) or (not says and _is_helper(walk, path)):
            continue
        for unit in (_unit(walk, path, parts), *_second_sets(walk, path, names, parts)):
            if unit.parts:
                around.update(above(parent_of(path)))
                yield unit


def _is_helper(walk: Walk, path: str) -> bool:
    """Whether a module is part of an attention around it with its own queries, as DeepSeek-V3.2's indexer is."""
    around = [other for other in above(parent_of(path)) if says_attention(type(walk.modules[other]).__name__)]
    return any("q" in _projections(walk.names(other), True) for other in around)


def _second_sets(walk: Walk, path: str, names: Mapping[str, str], parts: Mapping[str, str]) -> Iterator[Unit]:
    """Further sets of queries, keys and values at the same path, grouped by the prefix and suffix of their names."""
    sets: dict[tuple[str | None, str | None], dict[str, str]] = {}
    for name, linear in names.items():
        match = AFFIXED.match(name.lower())
        # DeBERTa-like models project relative positions too (`pos_key_proj`). Those are not hidden states.
        if match and linear not in parts.values() and "pos" not in name.lower():
            sets.setdefault((match["before"], match["after"]), {})[match["word"][0]] = linear
    for other in sets.values():
        if "q" in parts and (len(other) == 3 or other.keys() == {"q"}):
            yield Unit("attn", path, walk.linears[other["q"]][0], other)


def _torch_unit(path: str, module: nn.MultiheadAttention) -> Unit:
    """The unit of torch's attention. It reads its weights directly, so the projections are parameters and not modules."""
    if module._qkv_same_embed_dim:
        parts = {letter: join(path, f"in_proj_weight[{letter}]") for letter in "qkv"}
    else:
        parts = {letter: join(path, f"{letter}_proj_weight") for letter in "qkv"}
    return Unit("attn", path, module.embed_dim, {**parts, "o": join(path, "out_proj")})


def _projections(names: Mapping[str, str], says: bool) -> dict[str, str]:
    """The projections to queries, keys and values among linear layers by name; empty if this is not attention."""
    lower = {name.lower(): path for name, path in names.items()}
    parts = {letter: lower[name] for letter, known in PROJECTIONS.items() for name in lower if name in known}
    for part, known in LATENT.items():
        latent = [lower[name] for name in lower if name in known]
        if latent:
            parts.setdefault(part, latent[0])
    if "q" not in parts and "k" not in parts and "v" in parts:
        shared = [lower[name] for name in lower if name in KEYED]
        parts |= {"q": shared[0], "k": shared[0]} if shared else {}
    if "k" not in parts and "kv" not in parts:
        kv = [name for name in lower if name in FUSED_KV and ("q" in parts or name not in FUSED)]
        parts |= {"kv": lower[kv[0]]} if kv else _only_affixed(lower) if "q" in parts else {}
    if "q" in parts and (says or "kv" in parts or {"k", "v"} <= parts.keys()):
        return parts
    # State-space mixers (Mamba) also have an `in_proj`. It counts only if the class is named attention.
    fused = [path for name, path in lower.items() if name in FUSED and (name != "in_proj" or says)]
    if fused and "q" not in parts:
        return {"qkv": fused[0]}
    return parts if says else {}


def _only_affixed(names: Mapping[str, str]) -> dict[str, str]:
    """Keys and values with longer names beside plain queries, if there is exactly one of each (Evolla)."""
    found: dict[str, list[str]] = {"k": [], "v": []}
    for name, path in names.items():
        match = AFFIXED.match(name)
        if match and match["word"] != "query":
            found[match["word"][0]].append(path)
    return {letter: paths[0] for letter, paths in found.items()} if all(len(p) == 1 for p in found.values()) else {}


def _unit(walk: Walk, path: str, parts: dict[str, str]) -> Unit:
    width = _width(walk, parts)
    own = {name.lower(): linear for name, linear in walk.names(path).items() if linear not in parts.values()}
    outputs = [linear for name, linear in own.items() if name in OUTPUTS]
    output, at = _one_output(walk, outputs, parts, width), path
    if output is None and parts:
        output, at = _beside(walk, path, parts, width) or (None, path)
    if output is None:
        return Unit("attn", path, width, parts)
    # Between stages of different width, the hidden states after attention have the output projection's size.
    return Unit("attn", at, walk.linears[output][1], {**parts, "o": output}, own=at not in walk.repeated or at == path)


def _width(walk: Walk, parts: Mapping[str, str]) -> int | None:
    """The size of the hidden states that enter: the input size of the first projection on the way to queries."""
    first = next((parts[part] for part in ("q_a", "q", "qkv", "v", "kv_a", "kv") if part in parts), None)
    return walk.linears[first][0] if first else None


def _one_output(walk: Walk, candidates: list[str], parts: Mapping[str, str], width: int | None) -> str | None:
    """The output projection: the only candidate whose output has the hidden size, or whose input is the values."""
    back = [linear for linear in candidates if width is None or walk.linears[linear][1] == width]
    if len(back) != 1:
        # The width changes between stages (Hiera) and where two streams are concatenated (Zamba).
        values = _values(walk, parts)
        back = [linear for linear in back or candidates if values in (None, walk.linears[linear][0])]
    return back[0] if len(back) == 1 else None


def _values(walk: Walk, parts: Mapping[str, str]) -> int | None:
    if "v" in parts:
        return walk.linears[parts["v"]][1]
    return walk.linears[parts["qkv"]][1] // 3 if "qkv" in parts else None


def _beside(walk: Walk, path: str, parts: dict[str, str], width: int | None) -> tuple[str, str] | None:
    """The output projection in a sibling module (BERT's `attention.output`), and the path of the module around both."""
    parent = parent_of(path)
    if not path:
        return None
    linears = [linear for linear in walk.linears_below(parent) if not linear.startswith(f"{path}.")]
    if parent in walk.repeated:
        # In a block, siblings are other parts such as the MLP. Only those named attention belong here (SqueezeBERT).
        belongs = [child for child in walk.children[parent] if child != path and says_attention(name_of(child))]
        linears = [linear for child in belongs for linear in walk.linears_below(child)]
    output = _one_output(walk, linears, parts, width)
    return (output, parent) if output is not None else None
