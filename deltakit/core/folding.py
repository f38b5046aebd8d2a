"""Folds many paths into few selectors, and expands folded components.

    1-23    3-38:5    0-39!3-38:5    0,3,7-9    {q,k,v,o}    encoder.block.{1-23}.layer.0.SelfAttention.{q,v}

Expanding inverts folding: the selectors that `fold` returns expand to exactly the paths that were folded.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from deltakit.errors import SelectorError

# At most 18 digits: Python's `len` of a range ends at 19, and `int` refuses texts of thousands.
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_RANGE = re.compile(rf"{_NUMBER}-{_NUMBER}(?::([1-9][0-9]{{0,17}}))?")
_INDEX = re.compile(_NUMBER)
# What means something in a selector: wildcards, braces and their commas, scopes, roles, anchors, prefixes and ranges.
_SPECIAL = re.compile(r"[{},*/@^]|^\[|^re:|^\d+-\d|^\s|\s$")


def span(names: Sequence[str]) -> str:
    """Returns names as one text with indices folded: a range, a range with a step, a range without some, or a list.

    >>> span(["1", "2", "3"]), span(["3", "8", "13"]), span(["q", "k"]), span(["0", "1", "3", "4"])
    ('1-3', '3-13:5', 'q,k', '0-4!2')
    """
    if not all(map(_INDEX.fullmatch, names)):
        return ",".join(names)
    numbers = sorted(map(int, names))
    progression = _progression(numbers)
    if progression is not None:
        return progression
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)).difference(numbers))
    left_out = _progression(missing)
    runs = ",".join(_runs(numbers))
    if left_out is not None and len(missing) < len(numbers):
        # `0,2` reads better than `0-2!1`, and `0-4!2` than `0-1,3-4`.
        return min(f"{numbers[0]}-{numbers[-1]}!{left_out}", runs, key=len)
    return runs


def is_plain(name: str) -> bool:
    """Returns whether the grammar of selectors reads a name as itself, also in braces.

    >>> is_plain("q_proj"), is_plain("c_attn[q]"), is_plain("a/b"), is_plain("0-3")
    (True, True, False, False)
    """
    return _SPECIAL.search(name) is None


def fold(paths: Iterable[str]) -> tuple[str, ...]:
    """Returns the selectors that expand to exactly these paths, in the order of first occurrence.

    >>> fold(["layer.0.q", "layer.0.v", "layer.1.q", "layer.1.v", "head"])
    ('layer.{0-1}.{q,v}', 'head')
    """
    root = _Node()
    for path in paths:
        node = root
        components = path.split(".") if path else []
        special = not all(map(is_plain, components))
        # A path with a special name is not folded: in full, a selector matches it exactly.
        for component in [path] if special else components:
            node = node.children.setdefault(component, _Node(special=special))
        node.ends = True
    root.classify({})
    return tuple(root.selectors())


def expand(component: str, among: Collection[int] | None = None) -> tuple[str, ...]:
    """Returns the names that one component matches: itself, or the members of its braces.

    >>> expand("{0-6:2,q}"), expand("{0-4!1-3}"), expand("q_proj")
    (('0', '2', '4', '6', 'q'), ('0', '4'), ('q_proj',))
    >>> expand("{0-99999999999}", among=[3, 17])
    ('3', '17')

    Args:
        among: the only numbers that are wanted of ranges. Without it the time grows with `breadth(component)`: ask for that
            first where the component is not your own.

    Raises:
        SelectorError: if a member of the braces is empty, or a range runs backwards.
    """
    names: dict[str, None] = {}
    for member in _members(component):
        ranges = _ranges(member, component)
        if not ranges:
            names[member] = None
            continue
        numbers = ranges[0] if among is None else (number for number in among if number in ranges[0])
        names.update((str(number), None) for number in numbers if _is_left(number, ranges))
    return tuple(names)


def breadth(component: str) -> int:
    """Returns how many names `expand` looks at. It takes no time, however long the ranges are.

    >>> breadth("{0-99999999999,q}"), breadth("q_proj")
    (100000000001, 1)

    Raises:
        SelectorError: if a member of the braces is empty, or a range runs backwards.
    """
    found = [_ranges(member, component) for member in _members(component)]
    return sum(len(ranges[0]) * len(ranges) if ranges else 1 for ranges in found)


def _members(component: str) -> list[str]:
    if not (component.startswith("{") and component.endswith("}")):
        return [component]
    members = [member.strip() for member in component[1:-1].split(",")]
    if "" in members:
        raise SelectorError(
            f"{component!r}: a member of the braces is empty; write names or ranges, such as {{q,v}} or {{0-11}}"
        )
    return members


def _ranges(member: str, component: str) -> list[range]:
    """Returns the range that a member of braces is, and what is removed from it; an empty list if it is a name."""
    first, *removed = member.split("!")
    if not _RANGE.fullmatch(first) or "" in removed:
        return []
    ranges = []
    for text in (first, *removed):
        found = _RANGE.fullmatch(text if "-" in text else f"{text}-{text}")
        if found is None:
            # A name: no number is removed by it.
            break
        start, end, step = int(found[1]), int(found[2]), int(found[3] or 1)
        if start > end:
            raise SelectorError(f"{component!r}: the range {text!r} runs backwards; write it as {end}-{start}")
        ranges.append(range(start, end + 1, step))
    return ranges


def _is_left(number: int, ranges: Sequence[range]) -> bool:
    """Returns whether a number is in the first range and not removed: each range removes from the one before it."""
    left = False
    for members in reversed(ranges):
        left = number in members and not left
    return left


def _progression(numbers: Sequence[int]) -> str | None:
    """Returns the text of one number, or of at least two with a constant step (three if the step is not 1), else None."""
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {later - earlier for earlier, later in pairwise(numbers)}
    if steps == {1}:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(steps) == 1 and len(numbers) > 2:
        return f"{numbers[0]}-{numbers[-1]}:{steps.pop()}"
    return None


def _runs(numbers: Sequence[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


@dataclass
class _Node:
    """A node in the trie of components. Sibling nodes with equal subtrees (the same `kind`) are folded together."""

    ends: bool = False
    special: bool = False
    """Whether it stands for a whole path, which is not folded."""
    children: dict[str, "_Node"] = field(default_factory=dict)
    kind: int = -1

    def classify(self, classes: dict[object, int]) -> int:
        key = (self.ends, frozenset((name, child.classify(classes)) for name, child in self.children.items()))
        self.kind = classes.setdefault(key, len(classes))
        return self.kind

    def selectors(self) -> list[str]:
        found = [""] if self.ends else []
        groups: dict[int | str, list[str]] = {}
        for name, child in self.children.items():
            groups.setdefault(name if child.special else child.kind, []).append(name)
        for names in groups.values():
            text = names[0] if len(names) == 1 else "{" + _together(names) + "}"
            found += [f"{text}.{rest}" if rest else text for rest in self.children[names[0]].selectors()]
        return found


def _together(names: Sequence[str]) -> str:
    indices = [name for name in names if _INDEX.fullmatch(name)]
    others = [name for name in names if not _INDEX.fullmatch(name)]
    return ",".join(([span(indices)] if indices else []) + others)
