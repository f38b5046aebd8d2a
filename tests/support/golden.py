"""Compares what is printed with files in `tests/golden/`."""

import os

from support.paths import GOLDEN


def golden(name, text):
    """Compares a text with its file. `DELTAKIT_UPDATE_GOLDEN=1` writes the file again."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("DELTAKIT_UPDATE_GOLDEN"):
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8")
