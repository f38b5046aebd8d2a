"""`targets(model)`: the names that modules with weights have, which are what `at=` selects."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltakit.core import checked, class_name, fold, logical_parameters, name_of, own_modules, parent_of, span
from deltakit.view import Printed, Table, check_width


@dataclass(frozen=True)
class Leaf:
    """The modules of one type with one name.

    `shapes` counts them by the name and the logical shape of their first parameter; the shape is None if it is lazy. `where`
    are selectors that select exactly these modules, and `paths` are their paths.
    """

    name: str
    type: str
    shapes: dict[tuple[str, tuple[int, ...] | None], int]
    where: tuple[str, ...]
    paths: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of these modules."""
        return len(self.paths)


@dataclass(frozen=True, repr=False)
class Census(Printed):
    """The modules of a backbone that have parameters of their own, by their name and type."""

    owner: str
    leaves: tuple[Leaf, ...]
    width: int | None = field(default=None, compare=False)
    """The cells of a line in text, beyond which selectors stand below their lines; None for lines of any length."""

    def _parts(self) -> Iterator[str | Table]:
        yield f"targets in {self.owner}"
        rows = [(leaf.name, leaf.type, str(leaf.count), _shapes(leaf), "\n".join(leaf.where)) for leaf in self.leaves]
        yield Table(("name", "type", "count", "shape", "where"), rows, right=(2,), selectors=4, below=True)

    def to_dict(self) -> dict[str, Any]:
        """Returns its contents as data that `json.dumps` takes."""
        return {
            "model": self.owner,
            "targets": [
                {
                    "name": leaf.name,
                    "type": leaf.type,
                    "count": leaf.count,
                    "shapes": [
                        {"parameter": name, "shape": None if shape is None else list(shape), "count": count}
                        for (name, shape), count in leaf.shapes.items()
                    ],
                    "where": list(leaf.where),
                }
                for leaf in self.leaves
            ],
        }


@checked
def targets(backbone: nn.Module, *, width: int | None = None) -> Census:
    """Returns the names that `at=` can select: of all modules with parameters of their own, by name and type.

    Each comes with its number, the shape of its first parameter, and selectors that select exactly these modules. Deltas are
    left out. The backbone is not changed and may be on the meta device.

    >>> targets(nn.TransformerEncoderLayer(6, 2, 10))
    targets in TransformerEncoderLayer
      name       type                             count  shape                   where
      self_attn  MultiheadAttention                   1  in_proj_weight:[18, 6]  self_attn
      out_proj   NonDynamicallyQuantizableLinear      1  weight:[6, 6]           self_attn.out_proj
      linear1    Linear                               1  weight:[10, 6]          linear1
      linear2    Linear                               1  weight:[6, 10]          linear2
      norm1      LayerNorm                            1  weight:[6]              norm1
      norm2      LayerNorm                            1  weight:[6]              norm2

    Args:
        width: the cells of a line in text. Where lines are longer, selectors stand below them. Nothing is cut.

    Raises:
        TargetError: if the backbone is not a `torch.nn.Module`.
        OptionError: if `width` is below 1.
    """
    check_width("targets", width)
    groups: dict[tuple[str, str], list[tuple[str, tuple[str, tuple[int, ...] | None]]]] = {}
    for path, module in own_modules(backbone):
        found = logical_parameters(module)
        if found:
            shape = None if found[0].shape is None else tuple(found[0].shape)
            groups.setdefault((_kind_of_name(path), class_name(module)), []).append((path, (found[0].name, shape)))
    return Census(class_name(backbone), tuple(_leaf(kind, members) for (_, kind), members in groups.items()), width)


def _kind_of_name(path: str) -> str:
    """The last component; numbers are told apart by the module around them, which gives them their meaning."""
    name = name_of(path)
    return f"{name_of(parent_of(path))}." if name.isdecimal() else name


def _leaf(kind: str, members: list[tuple[str, tuple[str, tuple[int, ...] | None]]]) -> Leaf:
    paths = tuple(path for path, _ in members)
    names = list(dict.fromkeys(map(name_of, paths)))
    name = names[0] or "^"
    if names[0].isdecimal():
        around = name_of(parent_of(paths[0]))
        numbers = names[0] if len(names) == 1 else f"{{{span(names)}}}"
        name = f"{around}.{numbers}" if around else numbers
    # An empty path is the backbone itself, which the grammar writes so.
    where = tuple(selector or "^" for selector in fold(paths))
    return Leaf(name, kind, dict(Counter(shape for _, shape in members)), where, paths)


def _shapes(leaf: Leaf) -> str:
    (name, shape), *others = leaf.shapes
    return f"{name}:{'?' if shape is None else list(shape)}" + (f" and {len(others)} more" if others else "")
