"""`help(dk.LoRA)` explains all options, and `dk.<Tab>` lists what is public."""

import dataclasses
import inspect
import pydoc

import pytest

import deltakit as dk
from deltakit.core.method_help import with_shared_options


@pytest.mark.parametrize("kind", dk.METHODS.values(), ids=lambda kind: kind.name)
def test_help_explains_every_option(kind):
    text = pydoc.plain(pydoc.render_doc(kind))
    _, _, options = inspect.getdoc(kind).partition("\nArgs:\n")
    for field in dataclasses.fields(kind):
        named = [line for line in options.splitlines() if line.startswith("    ") and line[4:5].strip()]
        assert any(field.name in line.partition(":")[0].replace(" ", "").split(",") for line in named), field.name
        assert f"{field.name}: " in text or f"{field.name}, " in text
    assert options.count("    of: types of modules") == 1


def test_where_the_shared_options_are_written():
    """Behind a method's own, before the errors; a method without options, or without errors, gets them too."""
    base = "B.\n\n    Args:\n        at: where.\n        of: what\n            it is.\n\n    Raises:\n        E: if bad.\n    "
    own = "M.\n\n    Args:\n        r: the rank,\n            at least 1.\n\n    Raises:\n        E: if r is bad.\n    "
    shared = "    at: where.\n    of: what\n        it is."
    raises = "\n\nRaises:\n    E: if r is bad."
    assert with_shared_options(own, base) == f"M.\n\nArgs:\n    r: the rank,\n        at least 1.\n{shared}{raises}"
    assert with_shared_options("M.", base) == f"M.\n\nArgs:\n{shared}"


def test_what_tab_lists():
    assert set(dir(dk)) == {*dk.__all__, "integrations", "opendelta", "prompting"}
    assert all(hasattr(dk, name) for name in dir(dk))
