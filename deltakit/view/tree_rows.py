"""Writes a tree as rows: what a line says, in pieces, and the cells of its columns. Other files lay them out.

Counts are those of all modules that a row stands for in the whole model. So the rows below a row add up to it, also where
equal parts are folded, and `×N` is the number of modules.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from deltakit.core import fold, is_plain, span
from deltakit.errors import printable
from deltakit.view.calls import OF_A_FORWARD, cells_of
from deltakit.view.node import DeltaLine, Node, Relative
from deltakit.view.units import memory, short

_NOTHING: Mapping[str, str] = MappingProxyType({})

COLUMNS = ("members", "state", "count")
"""The columns that a tree has by default."""
ON_REQUEST = ("each", "dtype", "bytes", "device", *OF_A_FORWARD)
"""Further columns: the count in one of the modules, the stored dtype, the memory, and the device."""

GLYPHS = {"trainable": "●", "frozen": "○", "mixed": "◐", "delta": "Δ", "none": ""}


class Piece(NamedTuple):
    """A part of a row's label: its text, what it is, and how soon it gives way where a line is too narrow (0: last)."""

    text: str
    part: str
    gives_way: int = 0


class Row(NamedTuple):
    """One line of a printed tree.

    `ends` says for each level down to this row whether it is the last one there, `pieces` are its label, and `cells` its
    columns. `selector` selects exactly its modules; it is "" for rows that are no modules, or if there is none. `tied` holds
    the paths of the parameters that its own are tied to, by name; under "" that of the module that it is another name of.
    """

    ends: tuple[bool, ...]
    pieces: tuple[Piece, ...]
    cells: Mapping[str, str] = _NOTHING
    state: str = "none"
    selector: str = ""
    tied: Mapping[str, str] = _NOTHING

    @property
    def label(self) -> str:
        """The whole text of its label."""
        return "".join(piece.text for piece in self.pieces)


class _Place(NamedTuple):
    """Where a node stands: its path with folded components, how many modules it is in all, and how often its counts count."""

    path: tuple[str, ...]
    modules: int
    times: int
    exact: bool
    """Whether the path is a selector of exactly these modules."""


def rows(node: Node, *, structure_only: bool = False) -> list[Row]:
    """Returns the rows of a tree, the root first. `structure_only` leaves out what OpenDelta's tree does not have."""
    place = _Place((), 1, 1, True)
    return list(_Writer(structure_only).rows(node, (), place))


def state_of(node: Node) -> str:
    """Returns whether a node is "trainable", "frozen" or "mixed"; "none" if it has no parameters."""
    sizes = node.sizes
    if not sizes.total:
        return "none"
    return "trainable" if sizes.total_trained == sizes.total else "mixed" if sizes.total_trained else "frozen"


@dataclass
class _Writer:
    structure_only: bool

    def rows(self, node: Node, ends: tuple[bool, ...], around: _Place) -> Iterator[Row]:
        place = _inside(around, node) if ends else around
        yield self._node(node, ends, place)
        left = len(node.deltas) + len(node.children) + bool(node.hidden)
        for line in node.deltas:
            left -= 1
            yield _delta(line, (*ends, not left), place)
        for child in node.children:
            left -= 1
            yield from self.rows(child, (*ends, not left), place)
        if node.hidden:
            yield Row((*ends, True), (Piece(f"… {node.hidden} more lines", "more"),))

    def _node(self, node: Node, ends: tuple[bool, ...], place: _Place) -> Row:
        pieces = _title(node, self.structure_only) if ends else [Piece(node.names[0], "name")]
        if node.detail and not self.structure_only:
            pieces.append(Piece(f" {node.detail}", "detail", 2))
        tied, buffers = {}, []
        for weight in node.weights:
            if weight.is_buffer:
                buffers.append(str(weight))
                continue
            pieces.append(Piece(f" {weight}", "trainable" if weight.trainable else "frozen", 3))
            if weight.tied is not None:
                tied[weight.name] = _resolved(weight.tied, (*place.path, weight.name))
        pieces += [Piece(f" buffers {' '.join(buffers)}", "buffers", 4)] if buffers else []
        if node.alias is not None:
            tied[""] = _resolved(node.alias, place.path) or "root"
        if not self.structure_only:
            pieces += _ties(node, tied)
        state = state_of(node)
        each = node.sizes.total
        total = each * place.times
        count = short(total)
        cells = {
            "members": f"×{place.modules}" if place.modules > 1 else "",
            "state": GLYPHS[state],
            "count": "tied" if not total and any(weight.tied is not None for weight in node.weights) else count,
            "each": count if each == total else short(each),
            "dtype": _common(node.dtypes),
            "bytes": memory(node.sizes.bytes * place.times),
            "device": _common(node.devices),
        }
        if node.calls is not None:
            cells |= cells_of(node.calls, place.modules)
        selector = ".".join(place.path) or "^"
        exact = place.exact and selector.isprintable()
        return Row(ends, _printable(pieces), cells, state, selector if exact else "", tied)


def _inside(around: _Place, node: Node) -> _Place:
    if node.members == 1 and around.modules == 1:
        # Most modules of a large model whose blocks differ: no name is folded.
        return _Place((*around.path, node.names[0]), 1, around.times, around.exact and node.alias is None)
    # One name is its own component.
    component = fold(node.names) if node.members > 1 else node.names
    # A full path selects its module whatever characters it has; folded ones are read.
    folded = node.members > 1 or any(part.startswith("{") for part in around.path)
    plain = not folded or all(is_plain(name) and "[" not in name for name in node.names)
    return _Place(
        (*around.path, component[0] if len(component) == 1 else ",".join(node.names)),
        around.modules * node.members,
        around.times * (1 if node.twins else node.members),
        around.exact and plain and node.alias is None,
    )


def _title(node: Node, structure_only: bool) -> list[Piece]:
    if node.members == 1:
        return [Piece(node.names[0], "name"), Piece(f" ({node.types[0]})", "type", 1)]
    if len(set(node.types)) > 1:
        found, comma = [], ""
        for name, kind in zip(node.names, node.types, strict=True):
            found.append(Piece(comma + name, "folded"))
            comma = "," if structure_only else ", "
            found.append(Piece(f"({kind})" if structure_only else f" ({kind})", "type", 1))
        return found
    # OpenDelta's tree writes `encoder (T5Stack)`, but `1-23(T5Block)`.
    return [Piece(span(node.names), "folded"), Piece(f"{'' if structure_only else ' '}({node.types[0]})", "type", 1)]


def _ties(node: Node, tied: Mapping[str, str]) -> Iterator[Piece]:
    if node.alias is not None:
        yield Piece(f" → {tied['']}", "tie", 1)
    elif tied or node.twins:
        yield Piece(f"  = {', '.join(tied.values())}" if tied else "  tied", "tie", 2)


def _resolved(relative: Relative, here: tuple[str, ...]) -> str:
    """Where a relative path leads from here. Inside a fold it is true of each of its modules: `layers.{0-3}.a.weight`."""
    up, down = relative
    return ".".join((*here[: len(here) - up], *down))


def _delta(line: DeltaLine, ends: tuple[bool, ...], place: _Place) -> Row:
    frozen = line.count and not line.trained
    words = f"+{line.label} {line.summary}".rstrip()
    words += "".join(f" {word}" for word in (line.idle, "frozen" if frozen else "") if word)
    cells = {
        "members": f"×{place.modules}" if place.modules > 1 else "",
        "state": line.idle or GLYPHS["delta"] + (GLYPHS["frozen"] if frozen else ""),
        "count": short(line.count * place.times),
        "each": short(line.count),
        "dtype": _common({weight.dtype for weight in line.weights}),
        "bytes": memory(line.bytes * place.times),
        "device": _common({weight.device for weight in line.weights}),
    }
    pieces = [
        Piece(words, "delta"),
        *(Piece(f"{' ' * (1 + (not n))}{w}", "shape", 3) for n, w in enumerate(line.weights)),
    ]
    return Row(ends, _printable(pieces), cells, "delta")


def _common(values: Collection[str]) -> str:
    return next(iter(values)) if len(values) == 1 else "mixed" if values else ""


def _printable(pieces: list[Piece]) -> tuple[Piece, ...]:
    return tuple(piece if piece.text.isprintable() else piece._replace(text=printable(piece.text)) for piece in pieces)
