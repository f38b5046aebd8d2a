"""Folds many paths into few selectors, and expands folded components.

    1-23    3-38:5    0-39!3-38:5    0,3,7-9    {q,k,v,o}    encoder.block.{1-23}.layer.0.SelfAttention.{q,v}

Expanding inverts folding: the selectors that `fold` returns expand to exactly the paths that were folded.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from deltakit.errors import SelectorError

_RANGE = re.compile(r"(0|[1-9]\d*)-(0|[1-9]\d*)(?::([1-9]\d*))?(?:!(.+))?")
_INDEX = re.compile(r"0|[1-9]\d*")


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
    if left_out is not None and len(missing) < len(numbers):
        return f"{numbers[0]}-{numbers[-1]}!{left_out}"
    return ",".join(_runs(numbers))


def fold(paths: Iterable[str]) -> tuple[str, ...]:
    """Returns the selectors that expand to exactly these paths, in the order of first occurrence.

    >>> fold(["layer.0.q", "layer.0.v", "layer.1.q", "layer.1.v", "head"])
    ('layer.{0-1}.{q,v}', 'head')
    """
    root = _Node()
    for path in paths:
        node = root
        for component in path.split(".") if path else ():
            node = node.children.setdefault(component, _Node())
        node.ends = True
    root.classify({})
    return tuple(root.selectors())


def expand(component: str) -> tuple[str, ...]:
    """Returns the names that one component matches: itself, or the members of its braces.

    >>> expand("{0-6:2,q}"), expand("{0-4!1-3}"), expand("q_proj")
    (('0', '2', '4', '6', 'q'), ('0', '4'), ('q_proj',))

    Raises:
        SelectorError: if a member of the braces is empty, or a range runs backwards.
    """
    if not (component.startswith("{") and component.endswith("}")):
        return (component,)
    names = [name for piece in component[1:-1].split(",") for name in _piece(piece.strip(), component)]
    return tuple(dict.fromkeys(names))


def _piece(piece: str, component: str) -> Sequence[str]:
    if not piece:
        raise SelectorError(
            f"{component!r}: a member of the braces is empty; write names or ranges, such as {{q,v}} or {{0-11}}"
        )
    found = _RANGE.fullmatch(piece)
    if found is None:
        return [piece]
    first, last, step, left_out = int(found[1]), int(found[2]), int(found[3] or 1), found[4]
    if first > last:
        raise SelectorError(f"{component!r}: the range {piece!r} runs backwards; write it as {last}-{first}")
    without = set(_piece(left_out, component)) if left_out else set()
    return [name for name in map(str, range(first, last + 1, step)) if name not in without]


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
    children: dict[str, "_Node"] = field(default_factory=dict)
    kind: int = -1

    def classify(self, classes: dict[object, int]) -> int:
        key = (self.ends, frozenset((name, child.classify(classes)) for name, child in self.children.items()))
        self.kind = classes.setdefault(key, len(classes))
        return self.kind

    def selectors(self) -> list[str]:
        found = [""] if self.ends else []
        groups: dict[int, list[str]] = {}
        for name, child in self.children.items():
            groups.setdefault(child.kind, []).append(name)
        for names in groups.values():
            text = names[0] if len(names) == 1 else "{" + _together(names) + "}"
            found += [f"{text}.{rest}" if rest else text for rest in self.children[names[0]].selectors()]
        return found


def _together(names: Sequence[str]) -> str:
    indices = [name for name in names if _INDEX.fullmatch(name)]
    others = [name for name in names if not _INDEX.fullmatch(name)]
    return ",".join(([span(indices)] if indices else []) + others)
