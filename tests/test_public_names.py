"""Every method has its public name, and its row in the table that `deltakit methods` prints.

`DELTAKIT_UPDATE_GOLDEN=1 pytest tests/test_public_names.py` writes both.
"""

import json
import os
import pickle
import re
from dataclasses import asdict

import deltakit as dk
from deltakit.delta import method_rows
from support.golden import same_as_file
from support.paths import ROOT

UPDATES = bool(os.environ.get("DELTAKIT_UPDATE_GOLDEN"))
PUBLIC = ROOT / "deltakit" / "__init__.py"
IMPORT = re.compile(r"^    from deltakit\.(\S+) import (\w+) as \2$", re.M)
METHODS = re.compile(r"(?:^    from deltakit\.methods\.\w+ import .+\n)+", re.M)
TABLE = re.compile(r"(?<=_MODULE_OF = \{\n)[^}]+")


def own_methods():
    """The classes of the methods in deltakit/methods, without the small ones of other tests."""
    return [kind for kind in dk.METHODS.values() if kind.__module__.startswith("deltakit.methods.")]


def with_public_names(text, methods):
    """The code of a package that exports these methods, too: an import for type checkers, and an entry in the table."""

    def imports(found):
        names = {*IMPORT.findall(found[0])} | {
            (kind.__module__.removeprefix("deltakit."), kind.__name__) for kind in methods
        }
        return "".join(
            f"    from deltakit.{module} import {name} as {name}\n" for module, name in sorted(names, key=place)
        )

    text = METHODS.sub(imports, text)
    table = sorted((name, module) for module, name in IMPORT.findall(text))
    return TABLE.sub("".join(f'    "{name}": "{module}",\n' for name, module in table), text)


def place(found):
    """Where ruff sorts an import."""
    module, name = found
    return module, name.lower()


def test_every_method_has_a_public_name():
    text = PUBLIC.read_text(encoding="utf-8")
    wanted = with_public_names(text, own_methods())
    if UPDATES:
        PUBLIC.write_text(wanted, encoding="utf-8")
    else:
        assert text == wanted, "a method has no public name: run this test with DELTAKIT_UPDATE_GOLDEN=1"


def test_a_missing_name_is_written_where_it_belongs():
    text = PUBLIC.read_text(encoding="utf-8")
    without = text.replace("    from deltakit.methods.hira import HiRA as HiRA\n", "").replace(
        '    "HiRA": "methods.hira",\n', ""
    )
    assert len(without) < len(text)
    assert with_public_names(without, own_methods()) == with_public_names(text, own_methods())


def test_the_table_has_what_type_checkers_see():
    text = PUBLIC.read_text(encoding="utf-8")
    assert with_public_names(text, ()) == text
    assert {*dk.__all__} == {name for module, name in IMPORT.findall(text)} | {"__version__"}


def test_the_printed_table_has_what_methods_declare_and_can_do():
    rows = [asdict(row) for row in method_rows([kind.name for kind in own_methods()])]
    same_as_file(ROOT / "deltakit" / "cli" / "methods.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def test_public_names_are_pickled_by_where_they_are():
    for name in dk.__all__:
        value = getattr(dk, name)
        if callable(value):
            assert pickle.loads(pickle.dumps(value)) is value
