"""The shape of the package: which room imports which, how long files and functions are, and what is public."""

import ast
from functools import cache
from pathlib import Path

import jaxtyping
import pytest
import torch

import deltakit as dk
from deltakit.ops.int8_inputs import packed
from support.processes import in_a_process

PACKAGE = Path(dk.__file__).parent

# What each room may import; every room may import `errors`.
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "core": set(),
    "selection": {"core"},
    "injection": {"core"},
    "ops": {"core", "selection"},
    "methods": {"core", "ops", "selection"},
    "files": {"core", "selection", "version"},
    "view": {"core", "injection", "selection"},
    "measuring": {"core", "view"},
    "picking": {"core", "selection", "view"},
    "delta": {"core", "selection", "injection", "files", "view"},
    "integrations": {"core", "delta", "files"},
    "searching": {"core", "delta", "ops"},
    "prompting": {"core", "delta", "files", "injection", "methods", "ops"},
    "openprompt": {"core", "prompting"},
    "opendelta": {"core", "delta", "files", "methods", "ops", "picking", "view"},
}
FOR_AUTHORS = {
    "opendelta": {
        "BaseDeltaConfig",
        "CommonStructureMap",
        "DeltaBase",
        "SaveLoadMixin",
        "install",
        "logging",
        "set_axis_order",
    },
    "openprompt": {"PromptDataLoader", "PromptForClassification", "PromptModel", "Template", "Verbalizer", "install"},
    "core": {"current_call"},
    "integrations": {"lightning_callback", "small_checkpoints", "small_states", "training_steps"},
    "prompting": {
        "Encoded",
        "Ensemble",
        "Explanation",
        "KnowledgeableVerbalizer",
        "MixedVerbalizer",
        "Prediction",
        "PromptModel",
        "PrototypicalVerbalizer",
        "RuleVerbalizer",
        "SlotOutput",
        "SoftVerbalizer",
        "Template",
        "Verbalizer",
        "WordVerbalizer",
        "GeneratedTemplate",
        "ScoredTemplate",
        "ScoredWords",
        "TriggerSearch",
        "generate_templates",
        "score_templates",
        "search_label_words",
        "search_triggers",
    },
    "ops": {"Seeded", "linear_with", "normal", "uniform"},
}
"""What rooms offer to users and to authors of methods, also while nothing here uses it."""

ON_TOP = {"demo", "cli", "__main__", "__init__"}
"""Rooms that may import all others."""

FILE_LENGTH, FUNCTION_LENGTH = 300, 40


@cache
def sources():
    """The module name, path and syntax tree of every file of the package."""
    return [
        (".".join(path.relative_to(PACKAGE).with_suffix("").parts), path, ast.parse(path.read_text("utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def imports(tree):
    """The modules of deltakit that a file imports, each with the names taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("deltakit") for alias in node.names), "write `from deltakit... import`"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deltakit":
            module = node.module.removeprefix("deltakit").lstrip(".")
            for alias in node.names:
                yield (module, alias.name) if module else (alias.name, None)


def room_of(module):
    return module.split(".")[0]


def test_every_room_is_in_the_table():
    assert {room_of(name) for name, *_ in sources()} == MAY_IMPORT.keys() | ON_TOP


def test_rooms_import_only_what_the_table_allows():
    for name, _, tree in sources():
        room = room_of(name)
        for module, _ in imports(tree):
            other = room_of(module)
            allowed = room in ON_TOP or other in {room, "errors"} | MAY_IMPORT[room]
            assert allowed, f"{name} imports {module}: {room} may import {sorted(MAY_IMPORT[room])}"


def test_the_table_has_no_circle():
    left = {room: set(others) for room, others in MAY_IMPORT.items()}
    while left:
        free = [room for room, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for room in free:
            del left[room]


@cache
def offered(room):
    """What the `__init__` of a room offers, or None for a room that is one file."""
    path = PACKAGE / room / "__init__.py"
    if not path.exists():
        return None
    lists = [n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.Assign)]
    return next((set(ast.literal_eval(n.value)) for n in lists if n.targets[0].id == "__all__"), None)


def test_rooms_use_each_other_through_what_they_offer():
    used = {}
    for name, _, tree in sources():
        for module, taken in imports(tree):
            other = room_of(module)
            if other != room_of(name) and offered(other) is not None:
                assert module == other, f"{name} imports {module}: import {taken} from deltakit.{other}"
                used.setdefault(other, set()).update({taken} - {None})
    for room in MAY_IMPORT:
        wanted = used.get(room, set()) | FOR_AUTHORS.get(room, set())
        assert offered(room) is None or offered(room) == wanted, f"{room} offers what no other room uses"


def test_no_import_circles_within_a_room():
    arrows = {name: {m for m, _ in imports(tree) if room_of(m) == room_of(name)} for name, _, tree in sources()}
    left = {name: others for name, others in arrows.items() if not name.endswith("__init__")}
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_formats_import_no_other_format():
    """What several of them need stands one floor up, in `files/formats`."""
    folders = {path.name for path in (PACKAGE / "files" / "formats").iterdir() if path.is_dir()}
    for name, _, tree in sources():
        own = name.split(".")[2:3] if name.startswith("files.formats.") else []
        taken = {module.split(".")[2] for module, _ in imports(tree) if module.startswith("files.formats.")}
        assert not own or own[0] not in folders or not taken & folders - {*own}, name


def test_methods_import_no_other_method():
    for name, _, tree in sources():
        if room_of(name) == "methods" and not name.endswith("__init__"):
            assert not any(room_of(module) == "methods" for module, _ in imports(tree)), name


def test_one_place_each():
    text = {path: path.read_text(encoding="utf-8") for _, path, _ in sources()}
    for word, place in (
        ("register_forward_", "injection"),
        ("huggingface_hub import", "files/hub.py"),
        ("save_file(", "files/checkpoint.py"),
    ):
        users = {path.relative_to(PACKAGE).as_posix() for path, source in text.items() if word in source}
        assert users, f"nobody uses {word}"
        assert all(user.startswith(place) for user in users), f"{word} in {users}"


def test_public_names_are_listed_and_there():
    assert len(set(dk.__all__)) == len(dk.__all__)
    for name in dk.__all__:
        assert getattr(dk, name) is vars(dk)[name]
    assert dir(dk) == sorted([*dk.__all__, "integrations", "opendelta", "prompting"])
    # What was imported on the way is none of them.
    there = {name for name in vars(dk) if not name.startswith("_")} - {"jaxtyping", "sys", "import_module", "find_spec"}
    modules = {room_of(name) for name, *_ in sources()}
    assert there - modules - {"TYPE_CHECKING", "Any"} == set(dk.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="module 'deltakit' has no attribute 'Lorra'"):
        dk.Lorra  # noqa: B018


def test_no_module_has_the_name_of_a_public_function():
    functions = {name for name in dk.__all__ if callable(getattr(dk, name)) and name.islower()}
    assert "attach" in functions
    # The modules of OpenDelta's and OpenPrompt's APIs have their names.
    theirs = ("opendelta", "openprompt")
    modules = {part: name for name, *_ in sources() if room_of(name) not in theirs for part in name.split(".")}
    assert not functions & modules.keys(), {modules[name] for name in functions & modules.keys()}


def test_files_and_functions_are_short():
    for name, path, tree in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= FILE_LENGTH, f"{name} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                length = node.end_lineno - (body[0].lineno if body else node.lineno) + 1
                assert length <= FUNCTION_LENGTH, f"{name}: {node.name} has {length} lines"


def test_every_shape_in_a_signature_is_checked(pytestconfig):
    *checked, _ = pytestconfig.getoption("jaxtyping_packages").split(",")
    for name, _, tree in sources():
        if any(isinstance(node, ast.ImportFrom) and node.module == "jaxtyping" for node in tree.body):
            own = f"deltakit.{name}"
            assert any(own == other or own.startswith(f"{other}.") for other in checked) or name == "__init__", own
    with pytest.raises(jaxtyping.TypeCheckError, match="tokens d"):
        packed(torch.zeros(2))


def test_torch_is_imported_with_the_first_name():
    assert in_a_process("import sys, deltakit as dk; dir(dk), dk.__version__; print('torch' in sys.modules)") == "False"
    assert in_a_process("import sys, deltakit as dk; dk.LoRA; print('torch' in sys.modules)") == "True"
    assert in_a_process("from deltakit import *; print(LoRA, attach.__name__)").endswith("LoRA'> attach")


@pytest.mark.parametrize("first", ["core", "delta", "files", "integrations", "methods.lora", "opendelta"])
def test_all_methods_are_known_whatever_is_imported_first(first):
    code = f"import deltakit.{first}; from deltakit.core import METHODS; print(sorted(METHODS))"
    assert in_a_process(code) == repr(sorted(name for name, kind in dk.METHODS.items() if is_own(kind)))


def is_own(kind):
    """Whether a method is none of the small ones of other tests."""
    return kind.__module__.startswith("deltakit.methods.")


def test_importing_is_light():
    parts = (
        "transformers",
        "huggingface_hub.constants",
        "accelerate",
        "textual",
        "anywidget",
        "IPython",
        "http.server",
    )
    heavy = f"[m for m in {parts} if m in sys.modules]"
    code = f"import sys; from deltakit import *; print({heavy})"
    assert in_a_process(code) == "[]"
    assert "transformers" in in_a_process(f"import transformers; {code}")
