"""Folds equal siblings of a tree into one node, and unfolds them again.

Two parts are equal if everything that their lines show is equal: types, parameters' names, shapes, dtypes, whether they
are trainable, what they are tied to, the deltas, and all sizes. Each subtree gets a number by a key of exactly these facts and
of its children's numbers. So one pass is enough, and no two different subtrees can share a number.

Parts that are nearly equal are not folded, such as T5's first block, which alone has a relative bias. Written as
`0: as 1-23, with layer.0.SelfAttention.relative_attention_bias`, it would be 24 rows less for T5-large. But then no row would
have the modules of block 0: their selectors could not be copied, the rows below it would not add up to it, and deltas in it
would be seen only in rows whose selectors and counts are those of the other blocks. `depth=` and `filter=` shorten a tree
without that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from deltakit.core import is_plain
from deltakit.view.collector import collector_paused
from deltakit.view.node import Node


@collector_paused()
def folded(node: Node, *, indices_only: bool = False) -> Node:
    """Returns a tree, as `build` returns it, with equal siblings on one line.

    Args:
        indices_only: whether only the members of lists are folded, which have numbers for names.
    """
    return _Folder(indices_only).fold(node)[0]


def unfolded(node: Node) -> Node:
    """Returns a folded tree with one line for each module, as it was before."""
    if not node.children:
        return node
    alone = [one for child in node.children for one in _alone(child)]
    return node._replace(children=tuple(sorted(alone, key=lambda one: one.order)))


def _alone(node: Node) -> Iterator[Node]:
    first = unfolded(node._replace(names=node.names[:1], types=node.types[:1], order=node.order[:1], twins=()))
    yield first
    for place in range(1, node.members):
        like = node.twins[place - 1] if node.twins else first
        yield like._replace(names=(node.names[place],), types=(node.types[place],), order=(node.order[place],))


@dataclass
class _Folder:
    indices_only: bool
    numbers: dict[object, int] = field(default_factory=dict)
    done: dict[int, tuple[Node, int]] = field(default_factory=dict)
    """What became of each node, by its id: equal parts of a tree may be one object."""

    def fold(self, node: Node) -> tuple[Node, int]:
        """Returns the folded node, and the number that all equal subtrees share."""
        if id(node) not in self.done:
            self.done[id(node)] = self._folded(node)
        return self.done[id(node)]

    def _folded(self, node: Node) -> tuple[Node, int]:
        found = [self.fold(child) for child in node.children]
        inside = tuple((child.names, number) for child, number in found)
        key = (
            node.types,
            node.weights,
            node.deltas,
            node.detail,
            node.alias,
            node.sizes,
            node.omitted,
            node.left_out,
            node.calls,
            inside,
        )
        number = self.numbers.setdefault(key, len(self.numbers))
        together = _together(found, ordered=node.ordered, indices_only=self.indices_only)
        return (node._replace(children=together) if found else node), number


def _together(found: Sequence[tuple[Node, int]], *, ordered: bool, indices_only: bool) -> tuple[Node, ...]:
    """Equal siblings as one node at the position of the first; where order matters, only neighbours."""
    groups: list[list[Node]] = []
    by_number: dict[int, list[Node]] = {}
    owners: dict[str, tuple[list[Node], int]] = {}
    """The groups that are one leaf so far, or one and others tied to it, with its number."""
    for node, number in found:
        name = node.names[0]
        # A comma or a range in a name would make the line ambiguous.
        plain = is_plain(name) and (name.isdecimal() or not indices_only)
        own = owners.get(_owner(node) or "") if plain else None
        if own is not None:
            own[0].append(node)
            if by_number.get(own[1]) is own[0]:
                del by_number[own[1]]
            continue
        if plain and number in by_number:
            by_number[number].append(node)
            owners.pop(by_number[number][0].names[0], None)
            continue
        groups.append([node])
        if ordered:
            # Only the last group takes more members.
            by_number, owners = {}, {}
        if plain:
            by_number[number] = groups[-1]
            owners |= {} if node.children or node.deltas else {name: (groups[-1], number)}
    return tuple(map(_one, groups))


def _owner(node: Node) -> str | None:
    """The sibling that owns all weights of a leaf, if they are tied to a single one: T5's `shared` for `lm_head`."""
    if node.children or node.deltas or not node.weights:
        return None
    # From `lm_head.weight` it is two levels up, and then `shared.weight`.
    owners = {w.tied[1][0] if w.tied is not None and w.tied[0] == len(w.tied[1]) == 2 else "" for w in node.weights}
    return owners.pop() if len(owners) == 1 else None


def _one(members: Sequence[Node]) -> Node:
    first = members[0]
    if len(members) == 1:
        return first
    return first._replace(
        names=tuple(name for node in members for name in node.names),
        types=tuple(kind for node in members for kind in node.types),
        order=tuple(place for node in members for place in node.order),
        twins=tuple(members[1:]) if _owner(members[1]) == first.names[0] else (),
    )
