"""Finds feed-forward parts by structure: linear layers from the hidden size and back to it, outside attention."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from deltakit.core import above, linear_sizes, name_of, parent_of, unwrapped
from deltakit.selection.role_inference.names import EXPERTS, FUSED_GATES, GATES, says_feed_forward
from deltakit.selection.role_inference.role_map import Unit
from deltakit.selection.role_inference.walk import Walk


def feed_forward_units(walk: Walk, taken: set[str], widths: Mapping[str, int | None]) -> Iterator[Unit]:
    """Yields the feed-forward units of all blocks.

    Args:
        taken: the paths of attention units; their layers are not searched.
        widths: the hidden size of each block, or None if it is unknown.
    """
    experts: dict[str, Unit] = {}
    for path in walk.modules:
        up = list(above(path))
        block = next((other for other in up if other in widths), None)
        if block is None:
            continue
        # Layers inside attention belong to it, unless their class is named a feed-forward part (Evolla).
        says = says_feed_forward(type(walk.modules[path]).__name__)
        if not says and not taken.isdisjoint(up[: up.index(block) + (block in taken)]):
            continue
        yield from _pair(walk, path, block, widths[block], set() if says else taken)
        unit = _experts(walk, path, block, widths[block])
        if unit is not None:
            before = experts.get(unit.path)
            experts[unit.path] = Unit("ff", unit.path, unit.width, {**(before.parts if before else {}), **unit.parts})
    yield from experts.values()


def _pair(walk: Walk, path: str, block: str, width: int | None, taken: set[str]) -> Iterator[Unit]:
    """The feed-forward unit of the linear layers at a path or alone in its children, if they form one."""
    linears = [linear for linear in _linears(walk, path) if taken.isdisjoint(above(linear))]
    down = next((linear for linear in reversed(linears) if _is_down(walk, linear, linears, width)), None)
    if down is None:
        return
    inner, out = walk.linears[down]
    # If the inner size equals the hidden size, only the order distinguishes up from down.
    before = [a for a in linears if inner != out or walk.order[a] < walk.order[down]]
    ups = [a for a in before if a != down and walk.linears[a] == (out, inner)]
    fused = [a for a in linears if walk.linears[a] == (out, 2 * inner)]
    parts = {"down": down, **_ups(ups), **({"gate_up": fused[0]} if fused and not ups else {})}
    yield Unit("ff", path, out, parts, own=path != block)


def _linears(walk: Walk, path: str) -> list[str]:
    """The linear layers at a path: children, alone in a child, or two of equal size in one (CPM-Ant's gated MLP)."""
    found = []
    for child in walk.children[path]:
        below = walk.linears_below(child)
        if len(below) == 1 or (len(below) == 2 and walk.linears[below[0]] == walk.linears[below[1]]):
            found += below
    return found


def _is_down(walk: Walk, linear: str, linears: Sequence[str], width: int | None) -> bool:
    inner, out = walk.linears[linear]
    if width is not None and out != width:
        return False
    if width is None and not (linear_sizes(walk.modules[linear]) and out in walk.norm_sizes):
        # Without attention nearby, a pair of pointwise convolutions, or one over positions, would look the same.
        return False
    others = [other for other in linears if other != linear]
    if any(walk.linears[other] == (out, inner) for other in others):
        return True
    doubled = [other for other in others if walk.linears[other] == (out, 2 * inner)]
    return bool(doubled) and (
        len(others) == 1 or any(word in name_of(unwrapped(o)) for o in doubled for word in FUSED_GATES)
    )


def _ups(ups: Sequence[str]) -> dict[str, str]:
    gates = [up for up in ups if name_of(unwrapped(up)) in GATES]
    plain = [up for up in ups if up not in gates]
    return {**({"gate": gates[0]} if len(gates) == 1 else {}), **({"up": plain[0]} if len(plain) == 1 else {})}


def _experts(walk: Walk, path: str, block: str, width: int | None) -> Unit | None:
    """The unit of a mixture of experts that stores all experts' weights in 3-d parameters, without modules for them."""
    weights = {name: p for name, p in walk.modules[path]._parameters.items() if isinstance(p, Tensor) and p.ndim == 3}
    if not weights or not any(name in EXPERTS for name in (*weights, name_of(path))):
        return None
    parts = {}
    for name in weights:
        part = EXPERTS.get(name) or EXPERTS.get(name_of(path))
        if part is not None:
            parts[part] = f"{path}.{name}" if path else name
    parent = parent_of(path)
    holder = parent if parent != block and parent.startswith(block) else path
    return Unit("ff", holder, width, parts)
