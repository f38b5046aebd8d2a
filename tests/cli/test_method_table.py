"""`deltakit methods`: a complete row for every registered method, at any width."""

import io
import json
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn

import deltakit as dk
from deltakit.cli import main
from deltakit.cli.method_table import HEADS, MethodTable, cells
from deltakit.core import Design
from deltakit.delta import method_rows

WORDS = {
    "insertion": {"parallel", "sequential"},
    "merged": {"yes", "no", "partly"},
    **{ability: {"yes", "no"} for ability in ("summed", "mixed", "identity")},
}


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in method_rows()}


@pytest.fixture
def strangers():
    """Removes the methods that a test has defined."""
    before = dict(dk.METHODS)
    yield
    for name in dk.METHODS.keys() - before:
        del dk.METHODS[name]


def printed(rows, width, *, terminal):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None, highlight=False)
    console.print(MethodTable(map(asdict, rows)), soft_wrap=not terminal)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("name", sorted(dk.METHODS))
def test_every_method_has_a_complete_row(rows, name):
    row = rows[name]
    assert "?" not in cells(asdict(row)), dict(zip(("name", *vars(row.design)), cells(asdict(row)), strict=False))
    for field, words in WORDS.items():
        assert getattr(row.design if field == "insertion" else row, field) in words
    assert row.source.isascii()
    assert "http" in row.source or row.source[-4:].isdigit()


def test_abilities_are_those_that_the_methods_have(rows):
    said = {name: (row.merged, row.summed, row.mixed, row.identity) for name, row in rows.items()}
    assert said["lora"] == ("yes", "yes", "yes", "yes")
    assert said["adapter"] == ("no", "no", "yes", "yes")
    # One of its targets has no bias to merge into.
    assert said["bitfit"] == ("partly", "yes", "yes", "yes")
    assert said["prefix"] == ("no", "no", "yes", "no")
    assert rows["bitfit"].positions == ["@attn.{q,k,v,o}", "@ff.{up,down}", "@norm"]
    assert rows["soft_prompt"].positions == ["@embed"]
    assert rows["low_rank_adapter"].source.startswith("Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647")


@pytest.mark.parametrize("name", sorted(dk.METHODS))
def test_options_are_those_that_a_method_takes(rows, name):
    row, kind = rows[name], dk.METHODS[name]
    assert {*row.options, *row.required, "at", "of", "exclude"} == {field.name for field in fields(kind)}
    needed = {option: kind.example[option] for option in row.required}
    assert kind(**{**needed, **row.options}) == kind(**needed)
    json.dumps(row.options)


@pytest.mark.usefixtures("strangers")
def test_a_stranger_s_method_needs_nothing_for_its_row():
    class ShiftDelta(dk.OutputMap):
        def __init__(self, target):
            super().__init__(target)
            self.shift = nn.Parameter(torch.zeros(self.size))

        def forward(self, x, y):
            return y + self.shift

    @dataclass(frozen=True, kw_only=True)
    class Shift(dk.Method, name="shift"):
        """Nobody 2099, https://example.org/shift."""

        kind: ClassVar = ShiftDelta

        def positions(self):
            return (("ff.up",),)

    @dataclass(frozen=True, kw_only=True)
    class Needs(Shift, name="needs"):
        design: ClassVar = Design(form="b[n]")

        n: int

    (shift,) = method_rows(["shift"])
    assert cells(asdict(shift)) == (
        *("shift", "f(x, y)", "output", "sequential", "replacement", "@ff.up"),
        *("no", "no", "yes", "yes", "Nobody 2099, https://example.org/shift"),
    )
    # An option without a default or an example: what it declares is all that is known.
    assert cells(asdict(method_rows(["needs"])[0]))[:7] == (
        "needs",
        "b[n]",
        "output",
        "sequential",
        "replacement",
        "?",
        "?",
    )


def test_a_pipe_gets_one_line_each_and_a_narrow_terminal_short_lines(rows):
    table = list(rows.values())
    for width, terminal in ((40, False), (1000, True)):
        head, *lines = printed(table, width, terminal=terminal)
        assert len(lines) == len(table)
        assert head.split()[:2] == ["method", "form"]
        assert all(
            line.startswith(row.name) and line.endswith(row.source) for line, row in zip(lines, table, strict=True)
        )
        # Columns stand below their heads.
        assert {line.index(row.source) for line, row in zip(lines, table, strict=True)} == {head.index("source")}
    # Addresses are whole, over several lines.
    assert "…" not in "".join(printed(table, 40, terminal=True))
    narrow = printed(table, 60, terminal=True)
    assert max(map(len, narrow)) <= 60
    assert [line for line in narrow if line and not line.startswith(" ")] == list(rows)


def test_the_command(capsys):
    numbers = torch.get_rng_state()
    assert main(["methods", "lora", "bitfit"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["method", "bitfit", "lora", "bitfit", "lora"]
    assert out[4].startswith("lora options: r=8 alpha=16 ")
    assert "start='kaiming'" in out[4]
    assert main(["methods", "adalora"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("adalora options: total_steps=VALUE untie=False ")
    assert main(["methods"]) == 0
    assert "options:" not in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), numbers)
    assert main(["methods", "low-rank-adapter", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["low_rank_adapter"]


def test_a_name_that_no_method_has(capsys):
    assert main(["methods", "lorra"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "deltakit: Invalid value: there is no method 'lorra'; did you mean lora? See deltakit methods --help\n"
    )
    assert main(["methods", "xyz"]) == 2
    assert "'xyz'; the methods are adalora, adapter, adapter_fusion" in capsys.readouterr().err


def test_a_method_that_is_being_written_is_tried(monkeypatch, tmp_path, rows, capsys):
    (tmp_path / "methods.json").write_text("[]", encoding="utf-8")
    monkeypatch.setattr("deltakit.cli.method_table._FILE", tmp_path / "methods.json")
    assert main(["methods", "lora", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [asdict(rows["lora"])]


def test_the_heads_are_those_of_a_design():
    assert HEADS[1:5] == tuple(field.name for field in fields(Design))
