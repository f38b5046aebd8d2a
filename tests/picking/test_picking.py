"""`dk.pick`: where it shows the modules, and what it returns and prints."""

import re
import sys

import pytest

import deltakit as dk
from deltakit.picking import front_ends
from support.models import Transformer
from support.paths import ROOT


@pytest.fixture
def shown(monkeypatch):
    """A front end in the place of all: it ticks the second row, and remembers where it was shown."""
    found = []

    def show(place, picker, port):
        found.append((place, port))
        picker.tick(1)
        return True

    monkeypatch.setattr(front_ends, "_submitted", show)
    return found


def here(monkeypatch, *, terminal=False, browser=False, textual=True, anywidget=True, jupyter=False):
    """Sets what there is."""
    there = {"textual": textual, "anywidget": anywidget}
    monkeypatch.setattr(front_ends, "_has_terminal", lambda: terminal)
    monkeypatch.setattr(front_ends, "_has_browser", lambda: browser)
    monkeypatch.setattr(front_ends, "_in_jupyter", lambda: jupyter)
    monkeypatch.setattr(front_ends, "find_spec", lambda name: object() if there[name] else None)


@pytest.mark.parametrize(
    ("there", "place"),
    [
        ({"terminal": True}, "terminal"),
        ({"terminal": True, "browser": True}, "terminal"),
        ({"terminal": True, "browser": True, "textual": False}, "browser"),
        ({"browser": True}, "browser"),
    ],
)
def test_where_it_is_shown_by_itself(monkeypatch, shown, capsys, there, place):
    here(monkeypatch, **there)
    found = dk.pick(Transformer())
    assert shown == [(place, 0)]
    assert found.names == ("layers",)
    assert capsys.readouterr().out == 'dk.LoRA(at="layers")\n'


def test_where_it_is_shown_on_request(monkeypatch, shown):
    here(monkeypatch, terminal=True, browser=True)
    dk.pick(Transformer(), how="browser")
    # Only the browser has a port.
    dk.pick(Transformer(), port=8123)
    assert shown == [("browser", 0), ("browser", 8123)]
    with pytest.raises(
        dk.OptionError, match=r"pick\(how='terminal', port=3\): only the browser has a port; write how='browser'"
    ):
        dk.pick(Transformer(), how="terminal", port=3)
    for port in (-1, 65_536):
        with pytest.raises(
            dk.OptionError, match=rf"pick\(port={port}\): expected a number from 0 to 65535; omit it for"
        ):
            dk.pick(Transformer(), port=port)


@pytest.mark.parametrize(
    ("there", "how", "message"),
    [
        ({}, "auto", "neither a notebook, nor a terminal, nor a web browser is here; run it where one is"),
        ({"terminal": True, "textual": False}, "auto", "run pip install 'deltakit-tuning[tui]', or pass how='browser'"),
        ({}, "terminal", "the standard input or error is no terminal; run it in one, or pass how='browser'"),
        ({"textual": False}, "terminal", "textual is not installed; run pip install 'deltakit-tuning[tui]'"),
        ({"anywidget": False}, "notebook", "anywidget is not installed; run pip install 'deltakit-tuning[notebook]'"),
        (
            {"anywidget": False, "jupyter": True},
            "auto",
            "run pip install 'deltakit-tuning[notebook]', or pass how='browser'",
        ),
    ],
)
def test_what_is_not_there(monkeypatch, shown, there, how, message):
    here(monkeypatch, **there)
    with pytest.raises(dk.OptionError, match=message.replace("[", r"\[")):
        dk.pick(Transformer(), how=how)
    assert shown == []


@pytest.mark.parametrize("browser", [False, True])
def test_a_browser_is_opened_only_if_it_has_a_window(monkeypatch, browser):
    shown = []
    here(monkeypatch, browser=browser)
    monkeypatch.setattr("deltakit.picking.browser.in_browser", lambda picker, port, *, show: shown.append(show))
    assert dk.pick(Transformer(), how="browser") is None
    assert shown == [front_ends.webbrowser.open if browser else None]


@pytest.mark.parametrize(("ticks", "submitted"), [((), True), ((1,), False), ((), False)])
def test_nothing_picked_is_none(monkeypatch, capsys, ticks, submitted):
    def show(place, picker, port):
        for number in ticks:
            picker.tick(number)
        return submitted

    monkeypatch.setattr(front_ends, "_submitted", show)
    assert dk.pick(Transformer(), how="browser") is None
    assert capsys.readouterr() == ("", "deltakit: nothing was picked\n")


def test_what_is_there(monkeypatch):
    """Of this process: it has no kernel of Jupyter, and its streams are no terminal."""
    monkeypatch.setattr(sys, "stdin", None)
    assert not front_ends._has_terminal()
    assert not front_ends._in_jupyter()
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    assert not front_ends._has_browser()
    monkeypatch.setattr(front_ends.webbrowser, "get", lambda: object())
    monkeypatch.setenv("DISPLAY", ":0")
    assert front_ends._has_browser()


def test_the_extras_are_those_that_the_errors_name():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package, extra in front_ends._EXTRAS.values():
        assert re.search(rf'^{extra} = \["{package}>=', project, re.M)
