"""`pick(model)`: chooses where the picker is shown, and returns what was picked."""

import os
import sys
import webbrowser
from importlib.util import find_spec
from typing import Literal

from torch import nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.picking.picked_modules import Selection
from deltakit.picking.picker import Picker

How = Literal["auto", "terminal", "browser", "notebook"]

_EXTRAS = {"terminal": ("textual", "tui"), "notebook": ("anywidget", "notebook")}
"""The package that shows a picker there, and the extra that installs it."""


@checked
def pick(backbone: nn.Module, *, how: How = "auto", port: int = 0) -> Selection | None:
    """Shows the modules of a backbone to tick, and returns those that were; None if none were, or it was cancelled.

    It prints a line to paste, so that a script can do without the picker the next time. Ctrl-C ends it as it ends the
    program. The backbone is not changed and may be on the meta device.

    In a notebook it returns at once: the selection then has at all times what is ticked, at first nothing.

    Args:
        how: where to show them: "terminal" (needs the extra `tui`), "browser" (a page that only this machine can open) or
            "notebook" (needs the extra `notebook`). By default the notebook in one, else the terminal if there is one and
            the extra is installed, else the browser.
        port: the port of this machine that the page in the browser is served at; 0 for any that is free.

    Raises:
        TargetError: if the backbone is not a `torch.nn.Module`, or has no module with parameters in it.
        OptionError: if the extra is not installed, if there is nothing to show the picker in, or if the port is taken or is
            none.
    """
    found = picked(backbone, how=how, port=port)
    if found is None:
        print("deltakit: nothing was picked", file=sys.stderr)
    elif found.names:
        print(found.line)
    return found


def picked(backbone: nn.Module, *, how: str = "auto", port: int = 0, waits: bool = False) -> Selection | None:
    """Does what `pick` does, and prints nothing.

    Args:
        waits: whether to wait for the user in notebooks, too: there "auto" then is the browser.
    """
    if not 0 <= port < 2**16:
        raise OptionError(
            f"pick(port={port}): expected a number from 0 to {2**16 - 1}; omit it for a port that is free"
        )
    picker = Picker(backbone)
    place = how if how != "auto" else "browser" if port else _usual()
    if waits and place == "notebook":
        place = "browser"
    if port and place != "browser":
        raise OptionError(
            f"pick(how={how!r}, port={port}): only the browser has a port; write how='browser', or omit port="
        )
    _check_installed(place)
    # Without this check it would wait for keys that never come.
    if how == "terminal" and not _has_terminal():
        raise OptionError(
            "pick(how='terminal'): the standard input or error is no terminal; run it in one, or pass how='browser'"
        )
    if place == "notebook":
        from deltakit.picking.notebook import in_notebook

        return in_notebook(picker)
    return picker.selection() if _submitted(place, picker, port) and picker.ticked else None


def _submitted(place: str, picker: Picker, port: int) -> bool:
    # Imported only here: none of them is needed to import deltakit.
    if place == "browser":
        from deltakit.picking.browser import in_browser

        # One in the terminal could run no script, and would take the terminal.
        return in_browser(picker, port, show=webbrowser.open if _has_browser() else None)
    from deltakit.picking.terminal import in_terminal

    return in_terminal(picker)


def _usual() -> str:
    """Where a picker is shown if nobody says it."""
    if _in_jupyter():
        return "notebook"
    terminal = _has_terminal()
    if terminal and find_spec("textual") is not None:
        return "terminal"
    if _has_browser():
        return "browser"
    if terminal:
        raise OptionError(
            "pick: no web browser is here; for a picker in the terminal run pip install 'deltakit-tuning[tui]', or pass "
            "how='browser' and a port= that you forward, to open the page on another machine"
        )
    raise OptionError(
        "pick: neither a notebook, nor a terminal, nor a web browser is here; run it where one is, or write selectors: "
        "dk.targets(model) lists what they can be"
    )


def _check_installed(place: str) -> None:
    package, extra = _EXTRAS.get(place, ("", ""))
    if package and find_spec(package) is None:
        raise OptionError(
            f"pick(how={place!r}): {package} is not installed; run pip install 'deltakit-tuning[{extra}]', or pass "
            "how='browser'"
        )


def _in_jupyter() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # The shell in a terminal has no kernel.
    return getattr(shell, "kernel", None) is not None


def _has_terminal() -> bool:
    # Not the standard output: it may be piped, and textual draws on the standard error.
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _has_browser() -> bool:
    """Whether a browser with a window can be opened. Those in the terminal run no scripts."""
    shown = sys.platform in ("win32", "darwin") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    try:
        return bool(shown and webbrowser.get())
    except webbrowser.Error:
        return False
