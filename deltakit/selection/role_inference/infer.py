"""Roles inferred from structure, with no table per architecture.

Attention is where projections to queries, keys and values stand side by side, or one that fuses them; its output
projection gives back their input size. A feed-forward part is a pair of linear layers in a block, out of the hidden
size and back to it, outside the attention. What cannot be told for sure is left out, never guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from deltakit.core import above, name_of, parent_of
from deltakit.selection.role_inference.attention import attention_units
from deltakit.selection.role_inference.feed_forward import feed_forward_units
from deltakit.selection.role_inference.names import HEADS, says_cross
from deltakit.selection.role_inference.role_map import RoleMap, Unit
from deltakit.selection.role_inference.walk import Walk


def infer_roles(backbone: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> RoleMap:
    """The roles on a backbone. `modules`: its modules by path, if some of them are not to be looked at."""
    walk = Walk(backbone, dict(backbone.named_modules()) if modules is None else modules)
    attention = _crossed(list(attention_units(walk)))
    widths = _block_widths(walk, attention)
    taken = {unit.path for unit in attention}
    units = sorted([*attention, *feed_forward_units(walk, taken, widths)], key=lambda unit: walk.order[unit.path])
    blocks = sorted((block for block in widths if block in walk.repeated), key=walk.order.__getitem__)
    return RoleMap(tuple(units), tuple(blocks), tuple(walk.norms), _embed(walk), _head(walk), walk.order)


def _crossed(units: list[Unit]) -> list[Unit]:
    """The attention units, those marked that attend to another stack: by their name, or beside one that says `self`."""
    selves = {parent_of(unit.path) for unit in units if "self" in name_of(unit.path).lower()}
    beside = {
        unit.path for unit in units if parent_of(unit.path) in selves and "self" not in name_of(unit.path).lower()
    }
    return [replace(unit, cross=unit.own and (unit.path in beside or says_cross(unit.path))) for unit in units]


def _block_widths(walk: Walk, attention: Sequence[Unit]) -> dict[str, int | None]:
    """The repeated blocks with the sizes of their hidden states; around single units, the modules around them.

    In a hybrid some blocks of a list attend and others do not (Jamba): all of them are blocks. Without any attention
    the innermost repeated modules are.
    """
    widths = {walk.block(unit.path): unit.width for unit in attention}
    for block in list(widths):
        if block in walk.repeated:
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
        # transformers' own getter where a model has none, or more than one, to give.
        embedding = None
    if embedding is not None:
        return tuple(path for path, module in walk.modules.items() if module is embedding)
    # Inside blocks stand embeddings of distances (WavLM).
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
