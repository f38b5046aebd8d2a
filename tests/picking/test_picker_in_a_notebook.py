"""The picker in a notebook, without a server: messages of the widget reach the selection, and states come back."""

import sys

import pytest

pytest.importorskip("anywidget")

import deltakit as dk
from deltakit.picking import notebook
from deltakit.picking.picker import Picker
from support.models import Transformer, ids


@pytest.fixture
def displayed(monkeypatch):
    found = []
    monkeypatch.setattr("IPython.display.display", found.append)
    return found


def hear(widget, message):
    """What Jupyter does with a message of the page."""
    widget._handle_custom_msg(message, [])


def test_the_selection_has_what_is_ticked(displayed):
    backbone = Transformer()
    found = dk.pick(backbone, how="notebook")
    (widget,) = displayed
    assert widget is found.widget
    assert (found.names, found.selectors, found.line, len(found)) == ((), (), "", 0)
    assert repr(found) == "Selection of no module yet: tick some above"
    with pytest.raises(dk.SelectorError, match="an empty list of selectors selects nothing"):
        dk.attach(backbone, dk.LoRA(r=2, at=found))
    number = next(row.number for row in widget.picker.rows if row.path.endswith("v_proj"))
    hear(widget, {"do": "tick", "row": number, "on": True})
    assert widget.state["line"] == found.line == 'dk.LoRA(at="v_proj")'
    assert found.names == ("layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj")
    delta = dk.attach(backbone, dk.LoRA(r=2, at=found))
    hear(widget, {"do": "clear"})
    # The method has kept what was ticked.
    assert delta.methods[0].at == ("v_proj",)
    assert found.names == ()
    backbone(ids())


def test_bad_messages_change_nothing(displayed):
    found = dk.pick(Transformer(), how="notebook")
    before = dict(found.widget.state)
    for message in (None, "tick", {"do": "submit"}, {"do": "tick", "row": 10**6, "on": True}):
        hear(found.widget, message)
        assert found.widget.state["summary"].endswith("load the page again")
        assert found.names == ()
    hear(found.widget, {"do": "look"})
    assert found.widget.state == before


def test_what_the_widget_sends_to_its_page(displayed):
    widget = notebook.PickerWidget(Picker(Transformer()))
    state = widget.get_state()
    assert state["tree"]["title"] == "Transformer"
    assert state["state"]["ticked"] == {}
    assert "export default { render }" in state["_esm"]
    assert ".dk-pick" in state["_css"]


def test_auto_in_jupyter(displayed, monkeypatch):
    class Shell:
        kernel = object()

    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", Shell)
    assert dk.pick(Transformer()).widget is displayed[0]
