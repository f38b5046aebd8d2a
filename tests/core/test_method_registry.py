"""The registry of methods imports the file of one method for one, and all files for a list of all."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from deltakit import LoRA, methods
from deltakit.core.method_registry import Registry


def run(code):
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


IMPORTED = "print(*sorted(m.rpartition('.')[2] for m in sys.modules if m.startswith('deltakit.methods.')))"


def test_one_method_imports_its_own_file_alone():
    assert run(f"import sys; from deltakit import METHODS; METHODS['lora']; {IMPORTED}") == ["lora"]
    # Its file has another name.
    assert run("from deltakit import METHODS; print(METHODS['p_tuning_v2'].__name__)") == ["PTuningV2"]


def test_a_list_has_all():
    files = {found.stem for found in Path(methods.__file__).parent.glob("[!_]*.py")}
    assert set(run(f"import sys; from deltakit import METHODS; len(METHODS); {IMPORTED}")) == files


@pytest.mark.parametrize("name", ["nothing", "", "a.b", "..core", "__init__", "__path__", "import_module", "0", "a b"])
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
    run(code)


def test_another_thread_waits_until_a_file_is_whole(monkeypatch):
    """A class registers before its decorators have run: only the end of its file says that it is whole."""
    registry, waited = Registry(), []
    registry._kinds["lora"] = LoRA
    monkeypatch.setattr("deltakit.core.method_registry.import_module", lambda name: waited.append(name))
    assert registry["lora"] is LoRA
    assert waited == ["deltakit.methods.lora"]


def test_a_file_that_is_not_there():
    assert methods.lora is import_module("deltakit.methods.lora")
    with pytest.raises(AttributeError, match=r"module 'deltakit.methods' has no attribute 'nothing'"):
        methods.nothing  # noqa: B018
