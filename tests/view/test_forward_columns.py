"""`dk.show(model, inputs=...)`: shapes, calls and FLOPs are those of the forward, and it leaves nothing behind."""

import json
import re

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import INNER, WIDTH, Transformer, ids, same, snapshot


def found(view):
    """The rows of a view as JSON, by their selectors."""
    rows, ahead = {}, [json.loads(view.json())["root"]]
    while ahead:
        row = ahead.pop()
        rows[row["selector"]] = row
        ahead += row.get("children", [])
    return rows


def test_flops_are_those_of_the_formula():
    rows = found(dk.show(Transformer(), inputs=ids(3, 11)))
    up = 2 * 3 * 11 * WIDTH * INNER
    assert rows["layers.{0-1}.mlp.up_proj"]["flops"] == 2 * up
    assert rows["layers.{0-1}.mlp"]["flops"] == 4 * up
    assert rows["layers.{0-1}.mlp.up_proj"]["outputs"] == [[3, 11, INNER]]
    assert rows["layers.{0-1}.self_attn"]["outputs"] == [[3, 11, WIDTH]]
    # Four projections, and two products of 11 times 11 positions.
    attention = 4 * 2 * 3 * 11 * WIDTH * WIDTH + 2 * 2 * 3 * 11 * 11 * WIDTH
    assert rows["layers.{0-1}.self_attn"]["flops"] == 2 * attention
    assert rows["^"]["flops"] == 2 * attention + 4 * up + 2 * 3 * WIDTH * 3
    assert "flops" not in rows["layers"]


class Experts(nn.Module):
    """Three experts, as transformers computes them: one grouped product for all."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 16, 32, dtype=torch.bfloat16))

    def forward(self, x):
        ends = torch.tensor([4, 4, 9], dtype=torch.int32, device=x.device)
        return nn.functional.grouped_mm(x, self.weight, offs=ends)


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="this torch has no grouped product")
def test_products_of_experts_are_counted():
    x = torch.ones(9, 16, dtype=torch.bfloat16)
    assert found(dk.show(nn.Sequential(Experts()), inputs=x))["0"]["flops"] == 2 * 9 * 16 * 32


def test_deltas_are_counted_where_they_are():
    model = Transformer()
    before = found(dk.show(model, inputs=ids(3, 11)))["layers.{0-1}.self_attn.k_proj"]["flops"]
    dk.attach(model, dk.LoRA(r=5, at="q_proj"))
    after = found(dk.show(model, inputs=ids(3, 11)))["layers.{0-1}.self_attn.q_proj"]["flops"]
    assert after - before == 2 * (2 * 3 * 11 * 5 * (WIDTH + WIDTH))


def test_modules_that_are_called_twice_or_never_are_not_folded_with_others():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

        def forward(self, x):
            return self.parts[3](self.parts[0](self.parts[0](x)))

    rows = found(dk.show(Uneven(), inputs=torch.randn(7, 5)))
    calls = {selector: row["calls_of_each"] for selector, row in rows.items() if "calls_of_each" in row}
    assert calls == {"^": 1, "parts.0": 2, "parts.{1-2}": 0, "parts.3": 1}
    assert rows["parts.0"]["flops"] == 2 * rows["parts.3"]["flops"] == 2 * 2 * 7 * 5 * 5
    assert rows["parts.{1-2}"]["flops"] == 0
    text = str(dk.show(Uneven(), inputs=torch.randn(7, 5)))
    assert re.search(r" \[7, 5\] 2 calls +700 FLOP$", text, re.MULTILINE)
    assert "0 calls" in text


def test_text_of_the_columns():
    lines = str(dk.show(Transformer(), inputs=ids(3, 11), width=200)).splitlines()
    (up,) = [line for line in lines if "up_proj" in line]
    assert re.search(r" \[3, 11, 28\] 1 call 73.9 kFLOP$", up)
    # Only the columns that are asked for.
    assert "FLOP" not in str(dk.show(Transformer(), inputs=ids(), columns=["count", "output"]))
    with pytest.raises(dk.OptionError, match=r"show\(columns=...\): the column 'flops' needs a forward; pass inputs="):
        dk.show(Transformer(), columns=["flops"])
    with pytest.raises(dk.OptionError, match=r"show\(inputs=...\): the forward of the Transformer raised "):
        dk.show(Transformer(), inputs=[])


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5), nn.Dropout(0.5)).train()
    before, random = snapshot(model), torch.random.get_rng_state()
    dk.show(model, inputs=torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1)))
    same(before, snapshot(model))
    assert torch.equal(random, torch.random.get_rng_state())
    with pytest.raises(dk.OptionError):
        dk.show(model, inputs=torch.zeros(2, 2, 7))
    same(before, snapshot(model))
    assert torch.is_grad_enabled()
    assert model.training


def test_on_the_meta_device():
    """The counts are those of real tensors, and no parameter is computed with."""
    real = Transformer()
    with torch.device("meta"):
        empty = Transformer()
    one, other = (found(dk.show(model, inputs=ids())) for model in (real, empty))
    assert one == other
    assert one["^"]["flops"] > 0


def test_on_a_narrow_line_columns_on_request_give_way_before_names():
    lines = str(dk.show(Transformer(), inputs=ids(3, 11), width=38)).splitlines()
    assert any("k_proj" in line for line in lines)
    assert not any("[3, 11, 20]" in line for line in lines)
    assert all(re.search(r"[●○◐] +[0-9]", line) for line in lines if line[0] in "├│└")
    assert max(map(len, lines)) <= 38
