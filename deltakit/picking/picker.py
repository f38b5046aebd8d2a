"""The state of a picker: what is ticked, what a filter shows, and which selectors that makes. The front ends only show it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from deltakit.errors import DeltaError, OptionError, TargetError
from deltakit.picking.picked_modules import Selection, summary
from deltakit.picking.picker_rows import PickerRow, picker_rows
from deltakit.selection import BackboneIndex, match, shortest_selectors


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
    ticked: set[int] = field(init=False, default_factory=set)
    """The numbers of the rows that are ticked."""
    filter: str = field(init=False, default="")
    _index: BackboneIndex = field(init=False)
    _known: tuple[frozenset[int], Selection] = field(init=False, default=(frozenset(), Selection()))

    def __post_init__(self) -> None:
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
        self._set([self._row(row)], on)

    def everywhere(self, row: int, *, on: bool = True) -> None:
        """Ticks all rows with the name of this one, or removes their ticks."""
        name = self._row(row).same_name
        self._set([other for other in self.rows if other.same_name == name], on)

    def tick_matches(self, *, on: bool = True) -> None:
        """Ticks what the filter matches, or removes the ticks there; without a filter it does nothing."""
        self._set([self.rows[number] for number in self.matches()], on)

    def clear(self) -> None:
        """Removes all ticks."""
        self.ticked = set()

    def matches(self) -> list[int]:
        """Returns the numbers of the rows that the filter matches: as a part of their text, or as a selector."""
        text = self.filter.strip()
        if not text:
            return []
        try:
            hits = {self._index.first_name(path) for path in match(text, self._index.by_path, self._index.role)}
        except DeltaError:
            # Half of a selector that is being typed.
            hits = set()
        small = text.lower()
        return [
            row.number
            for row in self.rows
            if small in row.label.lower() or small in row.path.lower() or not hits.isdisjoint(row.paths)
        ]

    def shown(self) -> list[int]:
        """Returns the numbers of the rows to show: all, or those that the filter matches with the rows around them."""
        if not self.filter.strip():
            return [row.number for row in self.rows]
        found: set[int] = set()
        for number in self.matches():
            while number >= 0 and number not in found:
                found.add(number)
                number = self.rows[number].parent
        return sorted(found)

    def selection(self) -> Selection:
        """Returns the ticked modules, with selectors that the grammar reads as exactly these."""
        ticked = frozenset(self.ticked)
        if self._known[0] != ticked:
            wanted = {path for number in ticked for path in self.rows[number].paths}
            names = tuple(path for path in self._index.by_path if path in wanted)
            self._known = ticked, Selection(names, shortest_selectors(self._index, names))
        return self._known[1]

    def preview(self) -> Preview:
        """Returns what the ticks make."""
        found = self.selection()
        return Preview(summary(found.names) if found.names else "nothing is ticked yet", found.line)

    def _row(self, number: int) -> PickerRow:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.rows):
            raise OptionError(f"row {number!r}: expected a number from 0 to {len(self.rows) - 1}; load the page again")
        return self.rows[number]

    def _set(self, rows: list[PickerRow], on: bool) -> None:
        numbers = {row.number for row in rows if row.paths}
        self.ticked = self.ticked | numbers if on else self.ticked - numbers


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
            "can": bool(row.paths),
        }
        for row in picker.rows
    ]
    return {"title": picker.title, "rows": rows}


def state_of(picker: Picker) -> dict[str, Any]:
    """Returns what of a picker changes, as data for JSON."""
    preview = picker.preview()
    return {
        "ticked": sorted(picker.ticked),
        "shown": picker.shown(),
        "matches": len(picker.matches()),
        "filter": picker.filter,
        "summary": preview.summary,
        "line": preview.line,
    }
