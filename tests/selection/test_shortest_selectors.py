"""The shortest selectors of exactly some modules."""

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltakit.selection import BackboneIndex, shortest_selectors
from support.tiny_transformers import build

MODELS = {
    "t5": lambda: build("t5", num_layers=5, num_decoder_layers=3),
    "bert": lambda: build("bert", num_hidden_layers=7),
    "llama": lambda: build("llama", tf.AutoModelForCausalLM, num_hidden_layers=7),
    "gpt2": lambda: build("gpt2"),
}


@pytest.fixture(scope="module")
def indices():
    return {kind: BackboneIndex(make()) for kind, make in MODELS.items()}


@pytest.mark.parametrize(
    ("kind", "selected", "shortest"),
    [
        ("t5", ["q", "v"], ["{q,v}"]),
        ("t5", "encoder/q", ["encoder/q"]),
        ("t5", ["encoder/q", "decoder/v"], ["encoder/q", "decoder/v"]),
        ("t5", "decoder/SelfAttention.q", ["decoder/SelfAttention.q"]),
        ("t5", "EncDecAttention.{q,k}", ["EncDecAttention.{q,k}"]),
        ("bert", "@ff.down", ["@ff.down"]),
        ("bert", ["query", "value"], ["@attn.{q,v}"]),
        ("bert", "layer.{1-5:2}/query", ["layer.{1-5:2}/query"]),
        ("bert", "encoder/dense", ["encoder/dense"]),
        ("bert", "encoder.layer.3", ["layer.3"]),
        ("llama", "^model.layers.2.mlp", ["layers.2.mlp"]),
        ("llama", ["q_proj", "lm_head"], ["@head", "@attn.q"]),
        # The queries there are a part of a module.
        ("gpt2", "attn.c_attn", ["c_attn"]),
        ("gpt2", "mlp.c_proj", ["@ff.down"]),
        ("gpt2", "c_proj", ["c_proj"]),
        ("gpt2", "^", ["^"]),
    ],
)
def test_known_selections(indices, kind, selected, shortest):
    index = indices[kind]
    paths = index.select(selected)
    found = shortest_selectors(index, paths)
    assert sorted(found) == sorted(shortest)
    assert set(index.select(found)) == set(paths)


@given(data=st.data())
@settings(max_examples=60)
def test_any_modules_are_selected_exactly(indices, data):
    index = indices[data.draw(st.sampled_from(list(MODELS)))]
    paths = data.draw(st.lists(st.sampled_from(list(index.by_path)), unique=True, max_size=9))
    found = shortest_selectors(index, paths)
    assert bool(found) == bool(paths)
    if paths:
        assert set(index.select(found)) == set(map(index.first_name, paths))
        assert len(found) <= len(paths)


def test_a_parameter_of_the_same_name_is_not_selected():
    """`bias` would select both."""
    backbone = nn.ModuleDict({"a": nn.ModuleDict({"bias": nn.Linear(2, 3)}), "b": nn.Linear(3, 5)})
    assert shortest_selectors(BackboneIndex(backbone), ["a.bias"]) == ("a.bias",)


def test_other_names_of_a_module_are_that_module():
    shared = nn.Linear(2, 3)
    backbone = nn.ModuleDict(
        {"a": nn.ModuleDict({"x": shared}), "b": nn.ModuleDict({"y": shared, "x": nn.Linear(3, 5)})}
    )
    index = BackboneIndex(backbone)
    for path in ("a.x", "b.y"):
        assert index.select(shortest_selectors(index, [path])) == ["a.x"]
    assert shortest_selectors(index, ["b.x"]) == ("b.x",)


def test_names_at_the_root_do_not_hide_others():
    """A selector that matches from the root is anchored there."""
    inner = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    backbone = nn.ModuleDict({"head": nn.Linear(2, 3), "a": nn.ModuleDict({"head": nn.Linear(2, 3), "0": inner})})
    index = BackboneIndex(backbone)
    for paths in (["head"], ["a.head"], ["head", "a.head"], ["head", "a.0.0"], ["a.head", "a.0.1"], ["a.0", "a.0.0"]):
        assert set(index.select(shortest_selectors(index, paths))) == set(paths), paths


def test_hostile_names():
    backbone = nn.Sequential()
    for name in ("{q,v}", "*", "**", "a/b", "@attn", "re:x", "c[q]", "0-3", "^", " x"):
        backbone.add_module(name, nn.ModuleDict({"*": nn.Linear(2, 3), "x": nn.Linear(3, 2)}))
    index = BackboneIndex(backbone)
    # The backbone itself is "^", which is a name here.
    for path in filter(None, index.by_path):
        assert index.select(shortest_selectors(index, [path])) == [path], path


def test_of_no_module_there_is_none():
    assert shortest_selectors(BackboneIndex(torch.nn.Linear(2, 3)), []) == ()
