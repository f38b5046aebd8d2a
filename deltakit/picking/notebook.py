"""A picker in a notebook, by anywidget: the extra `notebook`.

A cell cannot wait for a widget: while it runs, no message of the widget arrives. So the widget is shown, and the selection
has at all times what is ticked.
"""

from typing import Any

import anywidget
import traitlets

from deltakit.errors import DeltaError
from deltakit.picking.page_script import SCRIPT, STYLE
from deltakit.picking.picked_modules import Selection
from deltakit.picking.picker import Picker, act, state_of, tree_of

ESM = (
    SCRIPT
    + """
function render({ model, el }) {
  const box = document.createElement("div");
  el.appendChild(box);
  const show = deltakitPicker(box, model.get("tree"), (message) => model.send(message));
  const update = () => show(model.get("state"));
  model.on("change:state", update);
  update();
  return () => model.off("change:state", update);
}
export default { render };
"""
)


class PickerWidget(anywidget.AnyWidget):
    """Shows a picker. The messages of its page go to `picker.act`, and what has changed comes back."""

    _esm = ESM
    _css = STYLE
    tree = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, picker: Picker) -> None:
        super().__init__(tree=tree_of(picker), state=state_of(picker))
        self.picker = picker
        self.on_msg(self._heard)

    def _heard(self, _: object, message: object, __: object) -> None:
        try:
            act(self.picker, message)
        except DeltaError as error:
            self.state = {**state_of(self.picker), "summary": str(error)}
        else:
            self.state = state_of(self.picker)


class LiveSelection(Selection):
    """What is ticked in a widget at the moment."""

    def __init__(self, widget: PickerWidget) -> None:
        super().__init__()
        self.widget = widget

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the modules that are ticked now."""
        return self.widget.picker.selection().names

    @property
    def selectors(self) -> tuple[str, ...]:
        """Selectors of exactly these."""
        return self.widget.picker.selection().selectors

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return super().__repr__() if self.names else "Selection of no module yet: tick some above"


def in_notebook(picker: Picker) -> LiveSelection:
    """Shows a picker below the cell, and returns the selection, which follows its ticks."""
    from IPython.display import display

    widget: Any = PickerWidget(picker)
    display(widget)
    return LiveSelection(widget)
