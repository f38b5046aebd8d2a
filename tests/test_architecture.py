"""The shape of the package: its import order, its public names, and what importing it must not import."""

import ast
import subprocess
import sys
from pathlib import Path

import deltakit as dk

PACKAGE = Path(dk.__file__).parent

# A file imports only from files before it.
ORDER = [
    "version",
    "errors",
    "sharding",
    "linears",
    "compressed",
    "factors",
    "lowrank",
    "role_names",
    "rows",
    "folding",
    "activations",
    "selectors",
    "roles",
    "inference",
    "reads",
    "stand_in",
    "axes",
    "layout",
    "batches",
    "method",
    "banks",
    "shadows",
    "paths",
    "readings",
    "fused",
    "modules",
    "targets",
    "role_table",
    "shapes",
    "attention.kernel",
    "attention.interface",
    "attention.mode",
    "attention.sites",
    "prompting_ids",
    "insertion",
    "methods",
    "report",
    "freeze",
    "state",
    "whole",
    "calls",
    "watchers",
    "hooks",
    "fingerprint",
    "checkpoint",
    "config",
    "card",
    "hub",
    "quantised",
    "merging",
    "swapping",
    "values",
    "describe",
    "delta",
    "plan",
    "rows_of_batch",
    "attach",
    "combine",
    "tree",
    "render",
    "html",
    "show",
    "opendelta",
    "demo",
    "cli",
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("deltakit"):
            base = node.module.removeprefix("deltakit").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                yield full if (PACKAGE / (full.replace(".", "/") + ".py")).exists() else base


def place(name):
    parts = name.split(".")
    return ORDER.index(name if name in ORDER else parts[0])


def test_imports_go_one_way():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name in ("__init__", "attention", "methods"):
            continue
        for other in imports(path):
            same_package = other.split(".")[0] == name.split(".")[0] and place(other) == place(name)
            assert same_package or place(other) < place(name), f"{name} imports {other}"


def test_methods_import_no_other_method():
    for path in (PACKAGE / "methods").glob("*.py"):
        assert not any(other.startswith("methods") for other in imports(path)), path.name


def test_one_file_each():
    text = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    for word, name in (
        ("register_forward_", "hooks.py"),
        ("huggingface_hub import", "hub.py"),
        ("save_file(", "checkpoint.py"),
    ):
        assert {path.name for path, source in text.items() if word in source} == {name}


def test_public_names_are_listed_and_there():
    assert len(set(dk.__all__)) == len(dk.__all__)
    assert all(hasattr(dk, name) for name in dk.__all__)


def test_files_are_small():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path.name


def test_importing_is_light():
    code = "import sys, deltakit; print([m for m in ('transformers', 'huggingface_hub.constants', 'accelerate') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    heavy = subprocess.run(
        [sys.executable, "-c", "import transformers; " + code], capture_output=True, text=True, check=True
    )
    assert "transformers" in heavy.stdout
