"""Every method has its public name: `DELTAKIT_UPDATE_GOLDEN=1 pytest tests/test_public_names.py` writes those that are missing."""

import os
import re

import deltakit as dk
from support.paths import ROOT

UPDATES = bool(os.environ.get("DELTAKIT_UPDATE_GOLDEN"))
PUBLIC = ROOT / "deltakit" / "__init__.py"
FROM, NAMES = (
    re.compile(r"(?:^from deltakit\.methods\.\w+ import .+\n)+", re.M),
    re.compile(r"(?<=__all__ = \[\n)[^]]+"),
)


def own_methods():
    """The classes of the methods in deltakit/methods, without the small ones of other tests."""
    return [kind for kind in dk.METHODS.values() if kind.__module__.startswith("deltakit.methods.")]


def with_public_names(text, methods):
    """The code of a package that exports these methods, too: an import, and an entry in `__all__`."""

    def imports(found):
        known = dict(re.findall(r"^from (\S+) import (.+)$", found[0], re.M))
        for kind in methods:
            names = known.get(kind.__module__, "").split(", ")
            known[kind.__module__] = ", ".join(sorted({*names, kind.__name__} - {""}, key=str.lower))
        return "".join(f"from {module} import {names}\n" for module, names in sorted(known.items()))

    def entries(found):
        names = {*re.findall(r'"(\w+)"', found[0]), *(kind.__name__ for kind in methods)}
        return "".join(f'    "{name}",\n' for name in sorted(names, key=place))

    return NAMES.sub(entries, FROM.sub(imports, text))


def place(name):
    """Where ruff sorts a name: constants, classes, functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_every_method_has_a_public_name():
    text = PUBLIC.read_text(encoding="utf-8")
    wanted = with_public_names(text, own_methods())
    if UPDATES:
        PUBLIC.write_text(wanted, encoding="utf-8")
    else:
        assert text == wanted, "a method has no public name: run this test with DELTAKIT_UPDATE_GOLDEN=1"


def test_a_missing_name_is_written_where_it_belongs():
    text = PUBLIC.read_text(encoding="utf-8")
    without = text.replace("from deltakit.methods.hira import HiRA\n", "").replace('    "HiRA",\n', "")
    assert len(without) < len(text)
    assert with_public_names(without, own_methods()) == with_public_names(text, own_methods())
