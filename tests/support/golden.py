"""Compares what is printed with files in `tests/golden/`."""

import os

from support.paths import GOLDEN


def golden(name, text):
    """Compares a text with its file in `tests/golden`. `DELTAKIT_UPDATE_GOLDEN=1` writes the file again."""
    same_as_file(GOLDEN / f"{name}.txt", text + "\n")


def same_as_file(path, text):
    """Compares a text with what is in a file. `DELTAKIT_UPDATE_GOLDEN=1` writes the file again."""
    if os.environ.get("DELTAKIT_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
