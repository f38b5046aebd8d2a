"""The state of a picker: what is ticked, what a filter shows, and which selectors that makes. The front ends only show it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from deltakit.errors import DeltaError, OptionError, TargetError
from deltakit.picking.picked_modules import Selection, summary
from deltakit.picking.picker_rows import PickerRow, picker_rows
from deltakit.selection import BackboneIndex, match, shortest_selectors
from deltakit.view import collector_paused


class Preview(NamedTuple):
    """What the ticks make: how many modules in words, and the line to paste ("" without ticks)."""

    summary: str
    line: str


@dataclass
class Picker:
    """The rows of a backbone, and what somebody has ticked of them.

    Raises:
        TargetError: if the backbone is no module, or has no module in it to pick.
    """

    backbone: nn.Module
    rows: tuple[PickerRow, ...] = field(init=False)
    ticked: frozenset[str] = field(init=False, default=frozenset())
    """The paths of the modules that are ticked."""
    filter: str = field(init=False, default="")
    _index: BackboneIndex = field(init=False)
    _known: tuple[frozenset[str], Selection] = field(init=False, default=(frozenset(), Selection()))

    def __post_init__(self) -> None:
        with collector_paused():
            self._index = BackboneIndex(self.backbone)
            self.rows = picker_rows(self.backbone)
        if not self.rows:
            raise TargetError(
                f"pick: this {self._index.owner} has no module with parameters in it; at='^' selects the model itself"
            )

    @property
    def title(self) -> str:
        """The class name of the backbone."""
        return self._index.owner

    def tick(self, row: int, *, on: bool = True) -> None:
        """Ticks a row, or removes its tick. It stands for its own modules, not for those in them."""
        self._set(self._row(row).paths, on)

    def everywhere(self, row: int, *, on: bool = True) -> None:
        """Ticks all rows with the name of this one, or removes their ticks."""
        name = self._row(row).same_name
        self._set([path for other in self.rows if other.same_name == name for path in other.paths], on)

    def tick_matches(self, *, on: bool = True) -> None:
        """Ticks what the filter matches, or removes the ticks there; without a filter it does nothing.

        It may be a part of a row: of the layers `0-23` those that `layers.{0-5}` selects.
        """
        self._set(self.matches(), on)

    def clear(self) -> None:
        """Removes all ticks."""
        self.ticked = frozenset()

    def ticked_in(self, row: int) -> int:
        """Returns how many modules of a row are ticked."""
        return len(self.ticked.intersection(self._row(row).paths))

    def matches(self) -> frozenset[str]:
        """Returns the paths that the filter matches: of rows that have it in their text, and what it is a selector of."""
        found = {path for row in self.rows if self._has(row) for path in row.paths}
        return frozenset(found | self._selected())

    def _has(self, row: PickerRow) -> bool:
        text = self.filter.strip().lower()
        return bool(text) and (text in row.label.lower() or text in row.path.lower())

    def _selected(self) -> set[str]:
        text = self.filter.strip()
        try:
            found = match(text, self._index.by_path, self._index.role) if text else ()
        except DeltaError:
            # Half of a selector that is being typed.
            return set()
        there = {path for row in self.rows for path in row.paths}
        return there.intersection(map(self._index.first_name, found))

    def shown(self) -> list[int]:
        """Returns the numbers of the rows to show: all, or those that the filter matches with the rows around them."""
        if not self.filter.strip():
            return [row.number for row in self.rows]
        found: set[int] = set()
        selected = self._selected()
        for number in [row.number for row in self.rows if self._has(row) or not selected.isdisjoint(row.paths)]:
            while number >= 0 and number not in found:
                found.add(number)
                number = self.rows[number].parent
        return sorted(found)

    def selection(self) -> Selection:
        """Returns the ticked modules, with selectors that the grammar reads as exactly these."""
        if self._known[0] != self.ticked:
            names = tuple(path for path in self._index.by_path if path in self.ticked)
            self._known = self.ticked, Selection(names, shortest_selectors(self._index, names))
        return self._known[1]

    def preview(self) -> Preview:
        """Returns what the ticks make."""
        found = self.selection()
        return Preview(summary(found.names) if found.names else "nothing is ticked yet", found.line)

    def _row(self, number: int) -> PickerRow:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.rows):
            raise OptionError(f"row {number!r}: expected a number from 0 to {len(self.rows) - 1}; load the page again")
        return self.rows[number]

    def _set(self, paths: Iterable[str], on: bool) -> None:
        self.ticked = self.ticked.union(paths) if on else self.ticked.difference(paths)


def act(picker: Picker, message: object) -> None:
    """Does what a page or a widget asks for: `{"do": "tick", "row": 3, "on": true}`.

    Raises:
        OptionError: if the message cannot be read.
    """
    asked: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
    what, row, text, on = (asked.get(key) for key in ("do", "row", "text", "on"))
    if what == "tick" and isinstance(on, bool):
        picker.tick(row, on=on)  # type: ignore[arg-type]  # which it checks
    elif what == "everywhere" and isinstance(on, bool):
        picker.everywhere(row, on=on)  # type: ignore[arg-type]
    elif what == "matches" and isinstance(on, bool):
        picker.tick_matches(on=on)
    elif what == "filter" and isinstance(text, str):
        picker.filter = text
    elif what == "clear":
        picker.clear()
    elif what != "look":
        raise OptionError("the picker cannot read this message; load the page again")


def tree_of(picker: Picker) -> dict[str, Any]:
    """Returns what of a picker never changes, for a page or a widget, as data for JSON."""
    rows = [
        {
            "depth": row.depth,
            "parent": row.parent,
            "label": row.label,
            "path": row.path,
            "name": row.name,
            "modules": len(row.paths),
        }
        for row in picker.rows
    ]
    return {"title": picker.title, "rows": rows}


def state_of(picker: Picker) -> dict[str, Any]:
    """Returns what of a picker changes, as data for JSON."""
    preview = picker.preview()
    return {
        # The rows with a tick, and how many of their modules have it.
        "ticked": {row.number: n for row in picker.rows if (n := picker.ticked_in(row.number))},
        "shown": picker.shown(),
        "matches": len(picker.matches()),
        "filter": picker.filter,
        "summary": preview.summary,
        "line": preview.line,
    }
