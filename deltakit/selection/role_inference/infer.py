"""Infers roles from the structure of a backbone. New architectures need no table entry.

Attention is a module whose children project to queries, keys and values, or one projection that fuses them; its output
projection returns to their input size. A feed-forward part is a pair of linear layers in a block, from the hidden size
and back to it, outside attention. Uncertain parts get no role, because a guess would put deltas in the wrong place.
"""

import dis
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from deltakit.core import above, name_of, own_modules, parent_of
from deltakit.selection.role_inference.attention import attention_units
from deltakit.selection.role_inference.ends import embeddings, heads
from deltakit.selection.role_inference.feed_forward import feed_forward_units
from deltakit.selection.role_inference.names import says_cross
from deltakit.selection.role_inference.role_map import RoleMap, Unit
from deltakit.selection.role_inference.walk import Walk

# Python 3.10 has instructions of their own for sums.
_SUMS = ("BINARY_ADD", "INPLACE_ADD")


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
    # Without attention, blocks are found by their forwards, and need not be in a list (timm's RegNet).
    blocks = sorted((b for b in widths if not attention or b in walk.repeated), key=walk.order.__getitem__)
    return RoleMap(tuple(units), tuple(blocks), tuple(walk.norms), embeddings(walk), heads(walk), walk.order)


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
    the blocks are the innermost repeated modules, and those that add to their input rather than what is in them.
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
        widths = dict.fromkeys(_residual_blocks(walk))
    return widths


def _residual_blocks(walk: Walk) -> list[str]:
    """The blocks of a backbone without attention."""
    adding = {path for path in walk.modules if path and _adds(walk.modules[path])}
    residual = adding & walk.repeated
    # The layers inside a residual block may be repeated modules, too (ResNet's convolutions with their norms), and so may be
    # the layers beside the stages that hold the blocks (EfficientNet's first).
    around = {path for block in residual for path in above(block)}
    lists = {parent_of(path) for path in around}
    others = {p for p in walk.repeated if parent_of(p) not in lists and residual.isdisjoint(above(p))}
    repeated = {path for path in residual | others if "weight" not in walk.modules[path]._parameters}
    outer = {path for block in repeated for path in above(parent_of(block))}
    if not repeated:
        # Blocks that are in no list (timm's RegNet): the outermost, because gates inside of them may add, too.
        return [path for path in walk.modules if path in adding and adding.isdisjoint(above(parent_of(path)))]
    return [path for path in walk.modules if path in repeated and path not in outer]


def _adds(module: nn.Module) -> bool:
    """Whether a module's own forward has a sum in it, as that of a residual block has."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    # A norm adds to its counter, and a layer with a weight is no block.
    if code is None or "weight" in module._parameters or type(module).__module__.startswith("torch.nn."):
        return False
    return any(step.opname in _SUMS or step.argrepr in ("+", "+=") for step in dis.get_instructions(code))
