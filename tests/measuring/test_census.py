"""`dk.targets`: every module with parameters is in one line, and the selectors of a line select exactly its modules."""

import json

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer
from support.quantized_layers import GPTQLike
from support.tiny_transformers import build


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "mixtral", "clip", "bloom", "vit"])
def test_selectors_select_exactly_the_modules(kind):
    model = build(kind)
    dk.attach(model, dk.LoRA(r=2))
    census = dk.targets(model)
    for leaf in census.leaves:
        assert set(dk.select(model, leaf.where)) == set(leaf.paths)
    # By torch's own walk, without the deltas.
    with_parameters = {
        path for path, m in model.named_modules() if list(m.parameters(recurse=False)) and "delta_lora" not in path
    }
    assert {path for leaf in census.leaves for path in leaf.paths} == with_parameters
    assert len({(leaf.name, leaf.type) for leaf in census.leaves}) == len(census.leaves)


def test_the_lines():
    text = str(dk.targets(Transformer()))
    assert text.splitlines()[:3] == [
        "targets in Transformer",
        "  name        type       count  shape            where",
        "  embed       Embedding      1  weight:[31, 20]  embed",
    ]
    assert "  up_proj     Linear         2  weight:[28, 20]  layers.{0-1}.mlp.up_proj\n" in text


def test_several_selectors_stand_below_each_other():
    lines = str(dk.targets(build("t5"))).splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.split()[:2] == ["q", "Linear"]]
    place = lines[first].index("encoder.block")
    assert [line[place:] for line in lines[first + 1 : first + 3]] == [
        "decoder.block.{0-1}.layer.0.SelfAttention.q",
        "decoder.block.{0-1}.layer.1.EncDecAttention.q",
    ]
    assert not lines[first + 1][:place].strip()


def test_numbers_are_told_apart_by_the_module_around():
    model = nn.ModuleDict(
        {
            "head": nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)),
            "tail": nn.Sequential(nn.Linear(3, 2)),
        }
    )
    found = {leaf.name: leaf for leaf in dk.targets(model).leaves}
    assert list(found) == ["head.{0-4:2}", "tail.0"]
    assert found["head.{0-4:2}"].where == ("head.{0-4:2}",)
    for leaf in found.values():
        assert set(dk.select(model, leaf.name)) == set(leaf.paths)
    assert "weight:[5, 3] and 2 more" in str(dk.targets(model))


def test_parameters_of_the_root_tied_twins_and_special_names():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.first = self.again = nn.Linear(3, 5)
            self.add_module("a,b", nn.Linear(3, 2))

    model = Own()
    found = dk.targets(model).leaves
    assert [leaf.name for leaf in found] == ["^", "first", "a,b"]
    for leaf in found:
        assert tuple(dk.select(model, leaf.where)) == leaf.paths


def test_shapes_are_those_of_the_architecture():
    layer = GPTQLike(nn.Linear(8, 24), torch.float32)
    assert dk.targets(nn.Sequential(layer)).leaves[0].shapes == {("weight", (24, 8)): 1}
    assert dk.targets(nn.Sequential(nn.LazyLinear(5))).leaves[0].shapes == {("weight", None): 1}


def test_json_and_notebooks():
    census = dk.targets(nn.ModuleDict({"<b>": nn.Linear(3, 5), "a\nb": nn.Linear(3, 5)}))
    data = json.loads(json.dumps(census.to_dict()))
    assert data["targets"][0] == {
        "name": "<b>",
        "type": "Linear",
        "count": 1,
        "shapes": [{"parameter": "weight", "shape": [5, 3], "count": 1}],
        "where": ["<b>"],
    }
    bundle = census._repr_mimebundle_()
    assert bundle["text/plain"] == str(census)
    assert "&lt;b&gt;</code>" in bundle["text/html"]
    assert r"a\nb" in bundle["text/plain"]


def test_selectors_stand_below_their_row_where_lines_are_too_long():
    census = dk.targets(build("t5"), width=80)
    lines = str(census).splitlines()[1:]
    assert max(map(len, lines)) <= 80
    # None is cut: they can still be copied.
    assert [line.strip() for line in lines if line.startswith("      ")] == [
        w for leaf in census.leaves for w in leaf.where
    ]
    assert [line.split()[0] for line in lines[1:] if not line.startswith("      ")] == [x.name for x in census.leaves]
    with pytest.raises(dk.OptionError, match=r"targets\(width=0\): expected at least 1"):
        dk.targets(build("t5"), width=0)
