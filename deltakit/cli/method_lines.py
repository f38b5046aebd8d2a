"""The methods as help and completion list them, read from the text of their files: importing them takes seconds, for torch."""

import ast
from functools import cache
from pathlib import Path

import typer

from deltakit.errors import did_you_mean

_FILES = Path(__file__).parents[1] / "methods"


@cache
def method_lines() -> dict[str, str]:
    """Returns the names of all methods in `deltakit/methods`, each with the first sentence of its class."""
    found = {}
    for file in _FILES.glob("*.py"):
        classes = [part for part in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(part, ast.ClassDef)]
        for name, kind in zip(map(_name, classes), classes, strict=True):
            if name is not None:
                words = " ".join((ast.get_docstring(kind) or "").partition("\n\n")[0].split())
                found[name] = words.partition(". ")[0].rstrip(".")
    return dict(sorted(found.items()))


def known_method(name: str) -> str:
    """Returns the name of a method as it is registered; a command line may have dashes in it.

    Raises:
        BadParameter: if there is no such method.
    """
    known = method_lines()
    found = name.replace("-", "_")
    if found in known:
        return found
    hint = did_you_mean(found.lower(), known) or f"; the methods are {', '.join(known)}"
    raise typer.BadParameter(f"there is no method {name!r}{hint}")


def _name(part: ast.ClassDef) -> str | None:
    """The name under which a class is registered: `class LoRA(Method, name="lora")`."""
    values = [keyword.value for keyword in part.keywords if keyword.arg == "name"]
    return next(
        (value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)), None
    )
