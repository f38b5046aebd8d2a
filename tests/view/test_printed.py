"""Tables as text and HTML: aligned, escaped, and readable in ASCII, without scripts, and on any page."""

import copy
import io
import sys

from rich.cells import cell_len
from torch import nn

import deltakit as dk
from deltakit.view.printed import Printed, Table


class Made(Printed):
    def __init__(self, *parts):
        self.parts = parts

    def _parts(self):
        return self.parts

    def to_dict(self):
        return {}


def test_columns_are_aligned_and_empty_ones_left_out():
    table = Table(
        ("name", "count", "empty", "where"),
        [("日本", "7", "", "a\nlonger"), ("b", "1,000", "", "c")],
        right=(1,),
        selectors=3,
    )
    lines = str(Made("head", table)).splitlines()
    assert lines == [
        "head",
        "  name  count  where",
        "  日本      7  a",
        "               longer",
        "  b     1,000  c",
    ]
    assert {
        cell_len(line[: line.index(end)]) for line, end in zip(lines[1:4], ("where", "a", "longer"), strict=True)
    } == {15}


def test_bars():
    table = Table(("x",), [("a",), ("b",), ("c",), ("d",)], bars=[1.0, 0.5, None, 0.0])
    assert str(Made(table)).splitlines() == [
        "              x",
        "  ██████████  a",
        "  █████       b",
        "              c",
        "              d",
    ]


def test_bars_in_ascii(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert "█" not in str(Made(Table(("x",), [("a",)], bars=[0.5])))
    assert "  #####  a" in str(Made(Table(("x",), [("a",)], bars=[0.5])))


def test_a_terminal_without_unicode_gets_escapes_for_names(monkeypatch):
    model = nn.Sequential(nn.ModuleDict({"käse": nn.Linear(8, 8), "b": nn.Linear(8, 8)}))
    bare = copy.deepcopy(model)
    delta = dk.attach(model, dk.LoRA(r=2, at="käse"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    plan = dk.plan(bare, dk.BitFit(at="käse"))
    for shown in (delta, plan, dk.show(model), dk.targets(model), dk.diff(bare, model), delta.show()):
        assert "k\\xe4se" in str(shown)
        assert str(shown).isascii()
    # The columns stand below each other, as wide as the escapes are.
    assert len({line.index("*") for line in str(dk.show(model)).splitlines() if " * 72" in line}) <= 1


def test_pages_escape_what_is_in_names():
    page = Made("<script>", Table(("<h>",), [("<td>\x1b",)], selectors=0)).html()
    assert "<script" not in page
    assert "&lt;td&gt;\\x1b" in page
    assert "\x1b" not in page
    # The page's own colours: none that one of two themes could hide.
    assert "color:" not in page.replace("color:inherit", "")
