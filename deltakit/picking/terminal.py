"""A picker in the terminal, by textual: the extra `tui`."""

from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Footer, Input, Static, Tree

from deltakit.errors import printable
from deltakit.picking.picker import Picker

_TICKED, _PARTLY, _UNTICKED, _ALIAS = "[x] ", "[-] ", "[ ] ", "    "


def in_terminal(picker: Picker) -> bool:
    """Shows a picker in the terminal, and returns whether the user has submitted it."""
    return bool(PickerApp(picker).run())


class _Modules(Tree[int]):
    """The tree. Space ticks here, and the arrows to the left and the right close and open; enter does both in textual."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "app.tick", "tick"),
        Binding("e", "app.everywhere", "everywhere"),
        Binding("a", "app.matches", "all matches"),
        Binding("c", "app.clear", "clear"),
        Binding("slash", "app.filter", "filter"),
        Binding("left", "close_branch", "close", show=False),
        Binding("right", "open_branch", "open", show=False),
    ]

    def action_close_branch(self) -> None:
        node = self.cursor_node
        if node is not None and node.allow_expand and node.is_expanded:
            node.collapse()
        elif node is not None and node.parent is not None and node.parent is not self.root:
            self.move_cursor(node.parent)

    def action_open_branch(self) -> None:
        if self.cursor_node is not None:
            self.cursor_node.expand()


class PickerApp(App[bool]):
    """The program in the terminal. Its result is True if the user has submitted, and None or False if not."""

    CSS = """
    _Modules { height: 1fr; }
    #preview { height: auto; max-height: 6; padding: 0 1; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "submit", "done", priority=True),
        Binding("escape", "leave", "cancel", priority=True),
        Binding("ctrl+c", "cancel", "cancel", show=False, priority=True),
        Binding("ctrl+q", "cancel", "cancel", show=False, priority=True),
    ]

    def __init__(self, picker: Picker) -> None:
        super().__init__()
        self.picker = picker
        self.drawn: dict[int, int] = {}
        """How many modules of each row its label says are ticked."""
        self.modules: _Modules = _Modules(Text(f"modules of {printable(picker.title)}"))

    def compose(self) -> ComposeResult:
        """Puts the filter, the tree, the preview and the keys below each other."""
        yield Input(placeholder="filter: a part of a name, or a selector such as @attn.q")
        yield self.modules
        yield Static(id="preview")
        yield Footer()

    def on_mount(self) -> None:
        """Fills the tree."""
        self.modules.show_root = False
        self._fill()
        self.modules.focus()

    def _fill(self) -> None:
        """Puts the rows that the filter shows into the tree."""
        at = self._at()
        self.modules.clear()
        nodes: dict[int, Any] = {-1: self.modules.root}
        inner = {row.parent for row in self.picker.rows}
        for number in self.picker.shown():
            row = self.picker.rows[number]
            nodes[number] = nodes[row.parent].add(
                self._label(number), data=number, expand=True, allow_expand=number in inner
            )
        self.modules.root.expand()
        if at in nodes and at >= 0:
            self.call_after_refresh(self.modules.move_cursor, nodes[at])
        self._preview()

    def _label(self, number: int) -> Text:
        row = self.picker.rows[number]
        count = self.drawn[number] = self.picker.ticked_in(number)
        partly = 0 < count < len(row.paths)
        box = _ALIAS if not row.paths else _PARTLY if partly else _TICKED if count else _UNTICKED
        some = f"  {count} of {len(row.paths)}" if partly else ""
        # Never markup: `[bold]` may be the name of a module.
        return Text(box + row.label + some, style="bold" if count else "")

    def _is_ticked(self, number: int) -> bool:
        return self.picker.ticked_in(number) == len(self.picker.rows[number].paths)

    def _show(self) -> None:
        """Shows the ticks and what they make."""
        ahead = list(self.modules.root.children)
        while ahead:
            node = ahead.pop()
            ahead += node.children
            # A new label lays out the whole tree again, which took minutes where all of 58,000 rows got one.
            if node.data is not None and self.picker.ticked_in(node.data) != self.drawn[node.data]:
                node.set_label(self._label(node.data))
        self._preview()

    def _preview(self) -> None:
        preview = self.picker.preview()
        self.query_one("#preview", Static).update(Text(f"{preview.summary}\n{preview.line}".rstrip()))

    def _at(self) -> int:
        node = self.modules.cursor_node
        return -1 if node is None or node.data is None else node.data

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filters the tree while the user types."""
        self.picker.filter = event.value
        self._fill()

    def on_input_submitted(self) -> None:
        """Goes from the filter into the tree."""
        self.modules.focus()

    def action_filter(self) -> None:
        """Goes to the filter."""
        self.query_one(Input).focus()

    def action_tick(self) -> None:
        """Ticks the row of the cursor, or removes its tick."""
        at = self._at()
        if at >= 0:
            self.picker.tick(at, on=not self._is_ticked(at))
            self._show()

    def action_everywhere(self) -> None:
        """Ticks all rows of the same name, or removes their ticks."""
        at = self._at()
        if at >= 0:
            self.picker.everywhere(at, on=not self._is_ticked(at))
            self._show()

    def action_matches(self) -> None:
        """Ticks all that the filter matches."""
        self.picker.tick_matches()
        self._show()

    def action_clear(self) -> None:
        """Removes all ticks."""
        self.picker.clear()
        self._show()

    def action_leave(self) -> None:
        """Leaves the filter, or else the picker."""
        if isinstance(self.focused, Input):
            self.modules.focus()
        else:
            self.exit(False)

    def action_cancel(self) -> None:
        """Leaves the picker without a result."""
        self.exit(False)

    def action_submit(self) -> None:
        """Leaves the picker with what is ticked."""
        self.exit(True)
