"""The registry of methods imports the file of one method for one, and all files for a list of all."""

from importlib import import_module
from pathlib import Path

import pytest

from deltakit import methods
from deltakit.core.method_registry import Registry
from support.processes import in_a_process

IMPORTED = "print(*sorted(m.rpartition('.')[2] for m in sys.modules if m.startswith('deltakit.methods.')))"


def test_one_method_imports_its_own_file_alone():
    assert in_a_process(f"import sys; from deltakit import METHODS; METHODS['lora']; {IMPORTED}") == "lora"
    # Its file has another name.
    assert in_a_process("from deltakit import METHODS; print(METHODS['p_tuning_v2'].__name__)") == "PTuningV2"


def test_a_list_has_all():
    files = {found.stem for found in Path(methods.__file__).parent.glob("[!_]*.py")}
    imported = in_a_process(f"import sys; from deltakit import METHODS; len(METHODS); {IMPORTED}")
    assert set(imported.split()) == files


@pytest.mark.parametrize(
    "name", ["nothing", "", "a.b", "..core", "__init__", "__path__", "import_module", "0", "a b", 5, None, ("a",)]
)
def test_names_that_no_method_has(name):
    """Names in files of others may be anything."""
    assert Registry().get(name) is None


def test_a_class_of_the_user_stays_when_ours_is_imported_later():
    code = """
import deltakit as dk
from dataclasses import dataclass
from deltakit.core import DeltaModule, Method
class Own(Method, name="ia3"):
    kind = type("OwnModule", (DeltaModule,), {})
assert dk.METHODS["ia3"] is Own
assert dk.IA3 is not Own
assert dict(dk.METHODS)["ia3"] is Own
assert list(dk.METHODS) == sorted(dk.METHODS)
"""
    in_a_process(code)


def test_another_thread_waits_until_a_file_is_whole(tmp_path):
    """A class registers before its decorators have run: only the end of its file says that it is whole."""
    (tmp_path / "slow.py").write_text(
        """
import builtins
from deltakit.core import DeltaModule, Method
class Slow(Method, name="slow_one"):
    kind = type("SlowModule", (DeltaModule,), {})
builtins.registered.set()
builtins.go_on.wait()
Slow.whole = True
"""
    )
    code = f"""
import builtins, threading
from importlib import import_module
from deltakit import METHODS, methods
methods.__path__.append({str(tmp_path)!r})
builtins.registered, builtins.go_on, found = threading.Event(), threading.Event(), []
first = threading.Thread(target=lambda: import_module("deltakit.methods.slow"))
second = threading.Thread(target=lambda: found.append(hasattr(METHODS["slow_one"], "whole")))
first.start()
builtins.registered.wait()
second.start()
second.join(0.3)
builtins.go_on.set()
second.join()
print(*found)
"""
    assert in_a_process(code) == "True"


def test_classes_can_be_exchanged_and_put_back():
    code = """
import deltakit as dk
from unittest import mock
ours, other = dk.LoRA, type("Other", (), {})
with mock.patch.dict(dk.METHODS, lora=other):
    assert dk.METHODS["lora"] is other
assert dk.METHODS["lora"] is ours
"""
    in_a_process(code)


def test_a_file_that_is_not_there():
    assert methods.lora is import_module("deltakit.methods.lora")
    for name in ("nothing", "lora.x", "_lora"):
        with pytest.raises(AttributeError, match=rf"module 'deltakit.methods' has no attribute '{name}'"):
            getattr(methods, name)
    assert {"lora", "prefix"} <= set(dir(methods))
