"""Infers roles from the structure of a backbone. New architectures need no table entry.

Attention is a module whose children project to queries, keys and values, or one projection that fuses them; its output
projection returns to their input size. A feed-forward part is a pair of linear layers in a block, from the hidden size
and back to it, outside attention. Uncertain parts get no role, because a guess would put deltas in the wrong place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from deltakit.core import above, name_of, own_modules, parent_of
from deltakit.selection.role_inference.attention import attention_units
from deltakit.selection.role_inference.feed_forward import feed_forward_units
from deltakit.selection.role_inference.names import HEADS, says_cross
from deltakit.selection.role_inference.role_map import RoleMap, Unit
from deltakit.selection.role_inference.walk import Walk


def infer_roles(backbone: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> RoleMap:
    """Returns the roles on a backbone.

    Args:
        modules: the modules to consider, by path; by default all of the backbone's.
    """
    walk = Walk(backbone, dict(own_modules(backbone)) if modules is None else modules)
    attention = _crossed(list(attention_units(walk)))
    widths = _block_widths(walk, attention)
    taken = {unit.path for unit in attention}
    units = sorted([*attention, *feed_forward_units(walk, taken, widths)], key=lambda unit: walk.order[unit.path])
    blocks = sorted((block for block in widths if block in walk.repeated), key=walk.order.__getitem__)
    return RoleMap(tuple(units), tuple(blocks), tuple(walk.norms), _embed(walk), _head(walk), walk.order)


def _crossed(units: list[Unit]) -> list[Unit]:
    """The units with `cross` set for attention to another stack: by its name, or as the sibling of one named `self`."""
    selves = {parent_of(unit.path) for unit in units if "self" in name_of(unit.path).lower()}
    beside = {
        unit.path for unit in units if parent_of(unit.path) in selves and "self" not in name_of(unit.path).lower()
    }
    return [replace(unit, cross=unit.own and (unit.path in beside or says_cross(unit.path))) for unit in units]


def _block_widths(walk: Walk, attention: Sequence[Unit]) -> dict[str, int | None]:
    """The hidden size of each block. A unit outside repeated blocks counts its parent module as its block.

    In hybrid models only some modules of a list attend (Jamba); all of them are blocks. In a backbone without attention
    the innermost repeated modules are the blocks.
    """
    widths = {walk.block(unit.path): unit.width for unit in attention}
    lists: set[str] = set()
    for block in list(widths):
        if block in walk.repeated and parent_of(block) not in lists:
            lists.add(parent_of(block))
            for sibling in walk.children[parent_of(block)]:
                if sibling in walk.repeated:
                    widths.setdefault(sibling, widths[block])
    if not widths:
        outer = {path for block in walk.repeated for path in above(parent_of(block))}
        widths = dict.fromkeys(path for path in walk.modules if path in walk.repeated and path not in outer)
    return widths


def _embed(walk: Walk) -> tuple[str, ...]:
    getter = getattr(walk.backbone, "get_input_embeddings", None)
    try:
        embedding = getter() if getter else None
    except (NotImplementedError, AttributeError):
        # transformers' getter raises on models without an input embedding, or with several.
        embedding = None
    if embedding is not None:
        return tuple(path for path, module in walk.modules.items() if module is embedding)
    # Embeddings inside blocks are those of distances (WavLM), not of tokens.
    tables = {
        path: m.num_embeddings
        for path, m in walk.modules.items()
        if isinstance(m, nn.Embedding) and not any(around in walk.repeated for around in above(path))
    }
    return (max(tables, key=tables.__getitem__),) if tables else ()


def _head(walk: Walk) -> tuple[str, ...]:
    getter = getattr(walk.backbone, "get_output_embeddings", None)
    head = getter() if getter else None
    if head is not None:
        return tuple(path for path, module in walk.modules.items() if module is head)
    base = getattr(walk.backbone, "base_model_prefix", "")
    roots = [child for child in walk.children[""] if any(True for _ in walk.modules[child].parameters())]
    if base and base in roots:
        return tuple(child for child in roots if child != base)
    return tuple(child for child in roots if child in HEADS)
