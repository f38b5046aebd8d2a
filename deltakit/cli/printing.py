"""Prints what a command found: as text, as JSON and as a web page."""

import io
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deltakit.errors import OptionError


def console() -> Console:
    """Returns the console of the standard output."""
    # rich assumes 80 cells for a file or a pipe, which would cut the lines of most trees.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def present(found: Any, data: object, *, title: str, json: bool, html: Path | None, wrap: bool = False) -> None:
    """Prints what a command found.

    Args:
        found: what is printed: an object with `__rich_console__`, or else its text.
        data: the same as what JSON has: dictionaries, lists, texts and numbers.
        title: the title of the web page.
        json: whether to print the data instead.
        html: where to write a web page, too.
        wrap: whether long lines may be wrapped by the terminal instead of cut.

    Raises:
        OptionError: if the page cannot be written.
    """
    if json:
        print(as_json(data))
    elif hasattr(found, "__rich_console__"):
        console().print(found, soft_wrap=wrap)
    else:
        print(found)
    if html is not None:
        from deltakit.view import web_page

        write_page(html, web_page(title, [_as_html(found)]))


def as_json(data: object) -> str:
    """Returns data as JSON. What is neither plain data nor a dataclass becomes a text."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=_plain)


def check_place(option: str, place: Path | None, *, is_folder: bool = False) -> None:
    """Refuses a place for a file or a folder where none can be written, before a command works for minutes.

    Raises:
        OptionError: if there is no folder around a file, or one is the other.
    """
    if place is None:
        return
    if is_folder and place.exists() and not place.is_dir():
        raise OptionError(f"{option} {place}: this is a file; pass a folder, or a path where nothing is")
    if not is_folder and (place.is_dir() or not place.parent.is_dir()):
        what = "this is a folder" if place.is_dir() else f"there is no folder {place.parent}"
        raise OptionError(f"{option} {place}: it cannot be written: {what}; pass a file in a folder that is there")


def write_page(file: Path, text: str) -> None:
    """Writes a web page and says so on the standard error.

    Raises:
        OptionError: if it cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--html {file}: it cannot be written: {error.strerror or error}; pass a file in a folder that is there"
        ) from error
    print(f"deltakit: the page is in {file}", file=sys.stderr)


def _plain(value: Any) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, (set, frozenset)) else str(value)


def _as_html(found: Any) -> str:
    if hasattr(found, "_repr_mimebundle_"):
        bundle: Mapping[str, str] = found._repr_mimebundle_()
        if "text/html" in bundle:
            return bundle["text/html"]
    from deltakit.view import preformatted

    if not hasattr(found, "__rich_console__"):
        return preformatted(str(found))
    file = io.StringIO()
    Console(file=file, width=1000, highlight=False).print(found, soft_wrap=True)
    return preformatted(file.getvalue())
