"""The tree as HTML, SVG and JSON, in files and in notebooks."""

import json
import re
import sys
import types
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.view.folding import folded
from deltakit.view.tree import build as tree
from support.golden import same_as_file
from support.models import Transformer, attached
from support.paths import ROOT
from support.tiny_transformers import build

HOSTILE = ['"><script>alert(1)</script>', "a' onclick='alert(1)", "</style><b>x</b>", "&lt;", "x\x1b[2J", "\ud800"]


def hostile():
    return nn.ModuleDict({name: nn.Linear(2, 3 + n) for n, name in enumerate(HOSTILE)})


class Page(HTMLParser):
    """What is shown and what can be copied, without the texts of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.selectors, self.tags, self.attributes = [], "", [], [], set()
        self.opened = 0
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)
        found = dict(attrs)
        self.attributes |= found.keys()
        self.opened += "open" in found
        self.selectors += [found["data-selector"]] if "data-selector" in found else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def test_names_of_others_are_text_and_nothing_else():
    html = dk.show(hostile()).html()
    page = Page(html)
    assert page.tags.count("script") == 1
    assert page.attributes <= {"class", "style", "open", "data-selector"}
    for name in HOSTILE[:4]:
        assert f"{name} (Linear)" in page.text
        assert name in page.selectors
    # With control characters they are escaped, and so no selectors.
    assert r"x\x1b[2J (Linear)" in page.text
    assert r"\ud800 (Linear)" in page.text
    assert len(page.selectors) == 5


def test_a_notebook_opens_down_to_the_deltas():
    model = build("t5")
    assert 1 < Page(dk.show(model).html()).opened < 14
    dk.attach(model, dk.LoRA(r=3, at="decoder/@attn.q"))
    html = dk.show(model).html()

    def around(node):
        return 0 if not node.sizes.delta else 1 + sum(map(around, node.children))

    assert Page(html).opened == around(folded(tree(model)))
    (row, *_) = re.findall(r'<div class="dk-row"[^>]*>(?:(?!dk-row).)*\+lora', html)
    assert "font-weight:bold" in row
    assert "background-color:rgba(" in row


def test_colours_are_those_of_the_page():
    html = dk.show(build("bert")).html()
    assert "color-scheme" not in html
    assert "light-dark" not in html
    assert "color-mix(in srgb,currentColor" in html
    # JupyterLab keeps the columns and guide lines of notebooks that are not trusted (its sanitizer.ts).
    styles = {name for style in re.findall(r'style="([^"]*)"', html) for name in re.findall(r"([a-z-]+):", style)}
    kept = "font-family font-size line-height margin-left padding-left border-left list-style-position display overflow"
    kept += " text-overflow white-space box-sizing max-width width background-color font-weight"
    assert styles <= {*kept.split()}


def test_columns_and_depth_in_html():
    view = dk.show(build("bert"), depth=2, columns=("count", "dtype"))
    text = Page(view.html()).text
    assert "more lines" in text
    assert "float32" in text
    assert "●" not in text
    assert "parameters" not in Page(dk.show(build("bert"), columns=()).html()).text


def test_svg_is_xml_with_the_lines_of_the_text():
    model = Transformer()
    dk.attach(model, dk.LoRA(r=3))
    view = dk.show(model)
    for shown in (view, dk.show(hostile())):
        root = ET.fromstring(shown.svg())
        rows = {}
        for part in root.iter("{http://www.w3.org/2000/svg}text"):
            rows.setdefault(part.get("y"), []).append(part.text)
        wanted = ["".join(line.split()) for line in str(shown).splitlines()]
        assert ["".join("".join(parts).split()) for parts in rows.values()] == wanted
    assert "prefers-color-scheme:dark" in view.svg()


def test_the_picture_in_the_readme_is_that_of_this_version(tmp_path):
    config = tf.LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    dk.attach(model, dk.LoRA(r=8))
    drawn = dk.show(model).save(tmp_path / "tree.svg").read_text(encoding="utf-8")
    same_as_file(ROOT / "examples" / "tree.svg", drawn)
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40]
    assert any("](examples/tree.svg)" in line for line in first_screen)


def test_json_has_the_counts_and_the_selectors():
    model = build("t5")
    delta = dk.attach(model, dk.LoRA(r=3))
    found = json.loads(dk.show(model, columns=("bytes",), buffers=True).json())
    assert (found["parameters"], found["in_deltas"]) == (tree(model).sizes.parameters, delta.num_parameters)
    lines = [line for row in every(found["root"]) for line in row.get("deltas", [])]
    assert sum(line["parameters"] for line in lines) == delta.num_parameters
    assert {line["state"] for line in lines} == {"active"}
    assert found["root"]["bytes"] == 4 * (found["parameters"] + found["in_deltas"])
    for row in every(found["root"]):
        assert len(dk.select(model, row["selector"])) == row["modules"]
    (embed,) = [row for row in every(found["root"]) if row["selector"] == "encoder.embed_tokens"]
    assert embed["weights"][0]["tied_to"] == "shared.weight"
    odd = json.loads(dk.show(hostile()).json())
    assert [row["names"][0] for row in odd["root"]["children"]] == HOSTILE


def every(row):
    yield row
    for child in row.get("children", []):
        yield from every(child)


@pytest.mark.parametrize("ending", ["html", "svg", "txt", "json", "HTML"])
def test_saving(ending, tmp_path):
    for view in (dk.show(Transformer()), dk.show(hostile())):
        path = view.save(tmp_path / f"tree.{ending}")
        text = path.read_text(encoding="utf-8")
        assert path.name == f"tree.{ending}"
        wanted = {"html": view.html, "svg": view.svg, "json": view.json}.get(ending.lower())
        assert wanted is None or wanted() in text
    assert ending.lower() != "html" or text.startswith('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">')


def test_saved_text_is_not_cut(tmp_path):
    wide = nn.ModuleDict({f"a_name_of_twenty_cells_{n}": nn.Linear(3, 4) for n in range(9)})
    assert "…" in str(dk.show(wide))
    assert "…" not in dk.show(wide).save(tmp_path / "a.txt").read_text(encoding="utf-8")
    assert "…" in dk.show(wide, width=60).save(str(tmp_path / "b.txt")).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "tree.pdf",
            r"View.save\('tree.pdf'\): expected a name that ends in .html, .svg, .txt, .json, found '.pdf'; write 'tree",
        ),
        ("tree", r"expected a name that ends in .html, .svg, .txt, .json, found ''"),
        (
            "none/tree.svg",
            r"View.save\('none/tree.svg'\): could not be written: .*; choose a file in a folder that exists",
        ),
    ],
)
def test_bad_files(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dk.OptionError, match=message):
        dk.show(nn.Linear(2, 3)).save(path)
    assert not [*tmp_path.iterdir()]


def test_deltas_plans_and_roles_in_a_notebook():
    model = Transformer()
    plan = dk.plan(model, dk.LoRA(r=3))
    delta = attached(model, dk.LoRA(r=3))
    for shown in (plan, delta, dk.roles(model)):
        bundle = shown._repr_mimebundle_()
        assert bundle["text/plain"] == repr(shown)
        page = Page(bundle["text/html"])
        assert "".join(page.text.split()) == "".join(repr(shown).split())
        assert page.opened > 0
        assert 'user-select:all">' in bundle["text/html"]
    odd = Page(dk.plan(hostile(), dk.LoRA(r=1, at="*"))._repr_mimebundle_()["text/html"])
    assert {*odd.tags} == {"div", "details", "summary", "span"}
    assert odd.attributes <= {"style", "open"}


class Shell:
    """A notebook: what cells display, and what a cell shows of its last value."""

    def __init__(self, monkeypatch):
        self.execution_count, self.shown = 1, []
        ipython, inner = types.ModuleType("IPython"), types.ModuleType("IPython.display")
        ipython.get_ipython = lambda: self
        inner.display = lambda bundle, raw: self.shown.append(bundle["text/plain"])
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", inner)
        monkeypatch.setattr("rich.console._is_jupyter", lambda: True)

    def end_of_cell(self, value):
        value._ipython_display_()
        self.execution_count += 1


def test_a_notebook_shows_a_structure_graph_once(monkeypatch, capsys):
    shell = Shell(monkeypatch)
    view = dk.Visualization(Transformer()).structure_graph()
    shell.end_of_cell(view)
    assert shell.shown == [str(view)]
    assert capsys.readouterr().out == ""
    shell.end_of_cell(view)
    assert shell.shown == [str(view)] * 2


def test_an_interpreter_prints_a_structure_graph_once(capsys):
    view = dk.Visualization(Transformer()).structure_graph()
    assert capsys.readouterr().out == str(view) + "\n"
    assert repr(view) == "<tree of Transformer, printed above>"


def test_a_structure_graph_in_a_pipe_is_not_cut(capsys):
    model = nn.ModuleDict({"a" * 90: nn.Linear(3, 4)})
    dk.Visualization(model).structure_graph()
    assert capsys.readouterr().out.splitlines()[1].endswith("(Linear) weight:[4, 3] bias:[4]")
