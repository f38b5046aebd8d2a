"""Deltas on a part of a model: beside one on another part, beside one on the whole, and seen from the whole model."""

import copy

import pytest
import torch

import deltakit as dk
from support.models import Transformer, ids, randomize, same, snapshot


@pytest.fixture
def model():
    return Transformer().eval()


@pytest.mark.parametrize("options", [{}, {"train": "0.mlp.up_proj"}])
def test_the_whole_around_a_part_that_has_a_delta(model, options):
    inner = randomize(dk.attach(model.layers, dk.LoRA(r=2), name="inner", **options))
    before = snapshot(model)
    with pytest.raises(
        dk.StateError,
        match=r"layers: delta 'inner' is attached to this ModuleList alone.* attach both to the same module",
    ):
        dk.attach(model, dk.BitFit(), name="outer", train="norm")
    same(before, snapshot(model))
    inner.detach()
    dk.attach(model, dk.BitFit(), name="outer", train="norm").detach()


@pytest.mark.parametrize("at", ["layers.0.mlp.up_proj", "classifier"])
def test_a_part_of_a_model_that_has_a_delta(model, at):
    """Also if the delta has no modules in the part, but fully trains something there."""
    outer = dk.attach(model, dk.LoRA(r=2, at=at), name="outer", train="layers.0.mlp.down_proj")
    before = snapshot(model)
    with pytest.raises(
        dk.StateError,
        match="this ModuleList has parts of delta 'outer', which is attached to a model around it; attach both",
    ):
        dk.attach(model.layers, dk.BitFit(), name="inner")
    same(before, snapshot(model))
    outer.detach()
    dk.attach(model.layers, dk.BitFit(), name="inner")


def test_what_the_errors_advise(model):
    one = dk.attach(model, dk.LoRA(r=2, at="layers.0.{mlp,self_attn}.*_proj"), name="one", train="norm")
    dk.attach(model, dk.LoRA(r=2, at="layers.0.{mlp,self_attn}.*_proj"), name="two", train="classifier")
    one.detach()


def test_deltas_on_two_parts(model):
    before, bare = snapshot(model), model(ids())
    one = randomize(dk.attach(model.layers[0], dk.LoRA(r=2), train="mlp.up_proj"))
    two = randomize(dk.attach(model.layers[1], dk.LoRA(r=2), train="mlp.up_proj"))
    assert [delta.backbone for delta in dk.deltas(model)] == [model.layers[0], model.layers[1]]
    assert [delta.name for delta in dk.deltas(model)] == ["delta", "delta"]
    assert not torch.equal(model(ids()), bare)
    one.detach()
    two.detach()
    same(before, snapshot(model))


@pytest.mark.parametrize("merged", [False, True])
def test_the_delta_of_a_part_seen_from_the_whole(model, tmp_path, merged):
    before, bare = snapshot(model), model(ids())
    made = randomize(dk.attach(model.layers[0], dk.LoRA(r=2), train="mlp.down_proj", name="made"))
    state, output = made.state_dict(), model(ids())
    if merged:
        made.merge()
    base = dk.base_state_dict(model)
    assert base.keys() == before["values"].keys()
    assert all(torch.equal(value, before["values"][name]) for name, value in base.items())
    clone = copy.deepcopy(model)
    for whole in (clone, model):
        delta = dk.deltas(whole)[0]
        assert delta.backbone is whole.layers[0]
        assert delta.modules.keys() == made.modules.keys()
        if merged:
            delta.unmerge()
        assert all(torch.equal(value, state[name]) for name, value in delta.state_dict().items())
        delta.save(tmp_path)
        delta.detach()
        same(before, snapshot(whole))
    fresh = copy.deepcopy(model)
    dk.load(tmp_path, fresh.layers[0])
    assert torch.equal(fresh(ids()), output)
    assert torch.equal(model(ids()), bare)


def test_rows_and_sums_from_the_whole(model):
    dk.attach(model.layers[0], dk.LoRA(r=2), name="part")
    randomize(dk.deltas(model)[0])
    half, other = dk.combine(model, {"part": 0.5}).delta, dk.combine(model.layers[0], {"part": 0.5}).delta
    assert half.backbone is model.layers[0]
    assert half.state_dict().keys() == other.state_dict().keys()
    output = model(ids())
    with dk.rows(model, ["part"] * 3):
        torch.testing.assert_close(model(ids()), output)


def test_the_own_values_of_a_part_of_a_model_with_a_delta(model):
    """The kept values have the names of the whole model, so the part alone would get the trained ones."""
    delta = randomize(dk.attach(model, dk.LoRA(r=2), train="layers.0.mlp.down_proj"))
    with pytest.raises(
        dk.StateError, match="base_state_dict: this ModuleList has parts of delta 'delta', .*; call it with that model"
    ):
        dk.base_state_dict(model.layers)
    delta.detach()
    assert dk.base_state_dict(model.layers).keys() == model.layers.state_dict().keys()


def test_a_part_beside_a_delta_elsewhere_in_the_model(model):
    """The delta on the whole leaves first, and takes none of the other's guards and notes along."""
    before = snapshot(model)
    outer = dk.attach(model, dk.LoRA(r=2, at="classifier"), name="outer", freeze=False)
    inner = dk.attach(model.layers, dk.LoRA(r=2), name="inner", train="0.mlp.up_proj")
    randomize(inner)
    output = model(ids())
    outer.detach()
    assert torch.equal(model(ids()), output)
    inner.detach()
    same(before, snapshot(model))
