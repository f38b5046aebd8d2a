"""`diff(a, b)`: what two models, or two state dicts, do not have in common."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from deltakit.core import checked, class_name, fold, parent_of, tensors_in
from deltakit.measuring.value_change import ValueChange, value_change
from deltakit.view import Printed, Table, check_width

Model = nn.Module | Mapping[str, Tensor]
"""A module, or the state dict of one."""

_ORDER = ("removed", "added", "type", "shape", "dtype", "trainable", "values")


@dataclass(frozen=True)
class Change:
    """One change, and the paths that have it.

    `kind` is "removed", "added", "type", "shape", "dtype", "trainable" or "values". `before` and `after` are what was there,
    as text. For values, `largest` is the largest absolute difference, and `relative` the smallest and the largest of
    ||b - a|| / ||a|| of these tensors; None if they are not known, as on the meta device.
    """

    kind: str
    before: str
    after: str
    paths: tuple[str, ...]
    largest: float | None = None
    relative: tuple[float, float] | None = None

    @property
    def where(self) -> tuple[str, ...]:
        """Selectors that stand for exactly these paths."""
        return tuple(selector or "^" for selector in fold(self.paths))


@dataclass(frozen=True, repr=False)
class Difference(Printed):
    """The changes from one model to another.

    `same` and `total` count the tensors of the second that are equal, also if only one of them is trainable, and all.
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    same: int
    total: int
    width: int | None = field(default=None, compare=False)
    """The cells of a line in text, beyond which selectors stand below their lines; None for lines of any length."""

    def _parts(self) -> Iterator[str | Table]:
        yield f"{self.before} -> {self.after}: " + ("no difference" if not self.changes else f"{self._counts()}")
        if self.changes:
            heads = ("change", "before", "after", "count", "max abs", "relative", "where")
            yield Table(heads, [_row(change) for change in self.changes], right=(3, 4, 5), selectors=6, below=True)

    def _counts(self) -> str:
        return f"{self.same:,} of {self.total:,} tensors are equal"

    def to_dict(self) -> dict[str, Any]:
        """Returns its contents as data that `json.dumps` takes. Numbers that are not finite are None."""
        changes = [
            {
                "kind": change.kind,
                "before": change.before,
                "after": change.after,
                "count": len(change.paths),
                "largest": _finite(change.largest),
                "relative": None if change.relative is None else list(map(_finite, change.relative)),
                "where": list(change.where),
            }
            for change in self.changes
        ]
        return {
            "before": self.before,
            "after": self.after,
            "changes": changes,
            "equal": self.same,
            "total": self.total,
        }


@checked
def diff(a: Model, b: Model, *, width: int | None = None) -> Difference:
    """Returns what changes from one model to another: modules, shapes, dtypes, trainability and values, with paths folded.

    Each argument is a module or a state dict; with a state dict, only tensors are compared. A copy of a state dict from before
    training shows what training changed.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    >>> before = {name: value.clone() for name, value in model.state_dict().items()}
    >>> _ = model[1].requires_grad_(False).weight.mul_(1.5)
    >>> print(diff(before, model).changes[0].where)
    ('1.weight',)

    Args:
        width: the cells of a line in text. Where lines are longer, selectors stand below them. Nothing is cut.

    Raises:
        OptionError: if an argument is neither a module nor a dictionary of tensors, or `width` is below 1.
    """
    check_width("diff", width)
    modules = isinstance(a, nn.Module) and isinstance(b, nn.Module)
    found: list[Change] = []
    gone: set[str] = set()
    if modules:
        found, gone = _modules(_by_path(a), _by_path(b))
    ours, theirs = ({k: v for k, v in _tensors(side).items() if not _is_in(k, gone)} for side in (a, b))
    changes, same = _changes(ours, theirs, trainable=modules)
    found += changes
    found.sort(key=lambda change: _ORDER.index(change.kind))
    return Difference(_name(a), _name(b), tuple(found), same, len(_tensors(b)), width)


def _name(side: Model) -> str:
    return class_name(side) if isinstance(side, nn.Module) else f"state dict of {len(side)} tensors"


def _by_path(model: Any) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _tensors(model: Model) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        return {name: value for name, value in model.items() if isinstance(value, Tensor)}
    return {name: value for path, module in _by_path(model).items() for name, value in tensors_in(path, module)}


def _modules(a: Mapping[str, nn.Module], b: Mapping[str, nn.Module]) -> tuple[list[Change], set[str]]:
    """Returns the changes of modules, and the paths of those that only one side has. What is in them is not listed again."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    gone: set[str] = set()
    for kind, one, other in (("removed", a, b), ("added", b, a)):
        for path, module in one.items():
            if path not in other:
                gone.add(path)
                if parent_of(path) in other or not path:
                    name = class_name(module)
                    groups.setdefault((kind, *((name, "") if kind == "removed" else ("", name))), []).append(path)
    for path, module in b.items():
        if path in a and class_name(a[path]) != class_name(module):
            groups.setdefault(("type", class_name(a[path]), class_name(module)), []).append(path)
    return [Change(*key, tuple(paths)) for key, paths in groups.items()], gone


def _is_in(name: str, gone: set[str]) -> bool:
    return bool(gone) and parent_of(name) in gone


def _changes(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, trainable: bool) -> tuple[list[Change], int]:
    """Returns the changes of tensors, and the number of those that are equal."""
    groups: dict[tuple[str, ...], list[str]] = {}
    values: dict[tuple[str, ...], list[ValueChange]] = {}
    same = 0
    for name in (*a, *(name for name in b if name not in a)):
        if name not in a or name not in b:
            kind, tensor = ("removed", a[name]) if name in a else ("added", b[name])
            what = str(list(tensor.shape))
            groups.setdefault((kind, *((what, "") if name in a else ("", what))), []).append(name)
            continue
        told = list(_facts(a[name], b[name], trainable=trainable))
        for fact in told:
            groups.setdefault(fact, []).append(name)
        if a[name].shape != b[name].shape:
            continue
        change = value_change(a[name], b[name])
        if change is not None:
            key = ("values", *(_pattern(name) if change.largest is not None else ()))
            groups.setdefault(key, []).append(name)
            values.setdefault(key, []).append(change)
        same += change is None and all(kind == "trainable" for kind, *_ in told)
    return [_change(key, tuple(names), values.get(key)) for key, names in groups.items()], same


def _facts(a: Tensor, b: Tensor, *, trainable: bool) -> Iterator[tuple[str, str, str]]:
    if a.shape != b.shape:
        yield "shape", str(list(a.shape)), str(list(b.shape))
    if a.dtype != b.dtype:
        yield "dtype", *(str(side.dtype).removeprefix("torch.") for side in (a, b))
    if trainable and a.requires_grad != b.requires_grad:
        yield "trainable", *("trainable" if side.requires_grad else "frozen" for side in (a, b))


def _pattern(name: str) -> tuple[str, ...]:
    """The components of a name without indices: tensors of repeated blocks share it, and so one row."""
    return tuple("#" if component.isdecimal() else component for component in name.split("."))


def _change(key: tuple[str, ...], names: tuple[str, ...], values: Iterable[ValueChange] | None) -> Change:
    if values is None:
        kind, before, after = key
        return Change(kind, before, after, names)
    found = Change("values", "", "", names)
    known = [change for change in values if change.largest is not None]
    relative = [change.relative for change in known if change.relative is not None]
    if known:
        found = replace(found, largest=max(change.largest or 0.0 for change in known))
    return replace(found, relative=(min(relative), max(relative))) if relative else found


def _finite(number: float | None) -> float | None:
    return number if number is not None and abs(number) < float("inf") else None


def _row(change: Change) -> tuple[str, ...]:
    low, high = change.relative or (None, None)
    relative = "" if low is None or high is None else f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    largest = "" if change.largest is None else f"{change.largest:.3g}"
    if change.kind == "values" and not largest:
        largest = "unknown"
    count = str(len(change.paths))
    return (change.kind, change.before, change.after, count, largest, relative, "\n".join(change.where))
