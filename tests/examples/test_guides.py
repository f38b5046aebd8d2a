"""The guides: their code runs, the tables of migration train the same parameters on both sides, and links lead somewhere."""

import re
import sys
import warnings

import pytest

import deltakit as dk
from support.guides import GUIDES, blocks, table, tables
from support.paths import ROOT

SESSIONS = [
    (guide, heading, column)
    for guide, theirs, headings in [
        ("from_peft", "PEFT", ["From the first line to the last", "Several adapters"]),
        ("from_opendelta", "OpenDelta", ["From the first line to the last"]),
        ("from_adapters", None, ["From the first line to the last"]),
        ("from_openprompt", "OpenPrompt", ["From the first line to the last"]),
    ]
    for heading in headings
    for column in [theirs, "deltakit"]
    if column
]


@pytest.fixture
def installed(monkeypatch):
    """`deltakit.opendelta.install()` and `deltakit.openprompt.install()` in a guide end with the test."""
    monkeypatch.setattr(sys, "modules", sys.modules)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("opendelta", "openprompt"):
            del sys.modules[name]


@pytest.mark.parametrize("path", sorted(GUIDES.glob("*.md")), ids=lambda path: path.stem)
@pytest.mark.usefixtures("installed")
def test_the_code_in_a_guide(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec"), {})


def names_of(guide):
    """A namespace with the model of a guide's tables."""
    names = {}
    exec(compile(blocks(GUIDES / f"{guide}.md", "python")[-1], guide, "exec"), names)
    return names


@pytest.mark.parametrize(("guide", "heading", "column"), SESSIONS)
@pytest.mark.usefixtures("installed")
def test_the_lines_of_a_migration_table_run_from_top_to_bottom(guide, heading, column, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, lines = names_of(guide), table(GUIDES / f"{guide}.md", heading).column(column)
    with warnings.catch_warnings():
        if column != "deltakit":
            warnings.simplefilter("ignore")
        for line in [line for cell in lines for line in cell]:
            exec(compile(line, f"{guide}: {line}", "exec"), names)
    assert len(lines) > 6


PEFT_CONFIGS = list(
    zip(*(table(GUIDES / "from_peft.md", "Configs").column(c) for c in ("PEFT", "deltakit")), strict=True)
)


@pytest.mark.parametrize(("theirs", "ours"), [(theirs, ours) for (theirs,), (ours,) in PEFT_CONFIGS])
def test_configs_of_peft_train_as_many_parameters(theirs, ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = names_of("from_peft")
        wrapped = names["get_peft_model"](names["model"], eval(theirs, names))
    names = names_of("from_peft")
    delta = dk.attach(names["model"], eval(ours, names))
    assert delta.num_parameters == wrapped.get_nb_trainable_parameters()[0]


OPENDELTA_METHODS = list(
    zip(*(table(GUIDES / "from_opendelta.md", "Methods").column(c) for c in ("OpenDelta", "deltakit")), strict=True)
)


@pytest.mark.parametrize(("theirs", "ours"), [(theirs, ours) for (theirs,), (ours,) in OPENDELTA_METHODS])
@pytest.mark.usefixtures("installed")
def test_methods_of_opendelta_train_as_many_parameters(theirs, ours):
    names = names_of("from_opendelta")
    model = eval(theirs, names)
    names = names_of("from_opendelta")
    delta = dk.attach(names["model"], eval(ours, names), train=())
    assert delta.num_parameters == model.num_trainable_parameters()


@pytest.mark.parametrize(("ours", "count"), [row[1:] for row in table(GUIDES / "from_adapters.md", "Configs").rows])
def test_configs_of_adapters_train_as_many_parameters(ours, count):
    """The numbers are those of adapters 1.2.0, which needs another version of transformers."""
    names = names_of("from_adapters")
    delta = dk.attach(names["model"], *eval(f"({ours.strip('`')},)", names), train=())
    assert delta.num_parameters == int(count or delta.num_parameters)


def test_the_table_of_methods_has_all():
    text = (GUIDES / "methods.md").read_text(encoding="utf-8")
    for kind in dk.METHODS.values():
        if kind.__module__.startswith("deltakit."):
            assert f"\n| `{kind.__name__}(" in text, kind
    ours = [kind for kind in dk.METHODS.values() if kind.__module__.startswith("deltakit.")]
    assert f"deltakit's {len(ours)} " in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_links_lead_to_files():
    for path in [*GUIDES.glob("*.md"), *ROOT.glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert "://" in link or (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_figures_beside_peft_are_those_of_the_benchmarks():
    beside = [row for found in tables(ROOT / "README.md") if found.heading == "Beside PEFT" for row in found.rows]
    measured = (ROOT / "benchmarks" / "results.md").read_text(encoding="utf-8")
    figures = [cell for row in beside for cell in row[1:] if cell[:1].isdigit()]
    assert len(figures) >= 20
    assert not [figure for figure in figures if f"| {figure} |" not in measured]
