"""What one delta keeps copies of (fully trained tensors, merged weights) no other delta may train, freeze or merge."""

import json
import re

import pytest
import torch

import deltakit as dk
from support.models import Transformer, ids, randomize, same, snapshot
from support.tiny_transformers import build


@pytest.fixture
def model():
    return Transformer().eval()


def refused(model, call, match):
    before = snapshot(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(dk.StateError, match=match):
        call()
    same(before, snapshot(model))
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_freeze_refuses_what_another_delta_trains(model):
    before = snapshot(model)
    one, two = dk.attach(model, dk.LoRA(r=3), name="one"), dk.attach(model, dk.BitFit(), name="two")
    one.freeze(train="classifier")
    refused(
        model, lambda: two.freeze(train="classifier"), r"classifier\.bias: delta 'one' fully trains it already; detach"
    )
    refused(model, lambda: two.freeze(train="^"), "delta 'one' fully trains it already")
    randomize(one)
    one.detach()
    # The advice works, and the other way round.
    two.freeze(train="classifier")
    randomize(two)
    refused(model, one.attach, "delta 'two' fully trains it already")
    two.detach()
    same(before, snapshot(model))


def test_a_tied_weight_is_taken_under_all_its_names(model):
    """A module that is registered twice has two names for one tensor."""
    model.again = model.layers[1].norm_1
    before = snapshot(model)
    one = dk.attach(model, dk.LoRA(r=2), name="one", train="layers.1.norm_1")
    two = dk.attach(model, dk.BitFit(at="up_proj"), name="two")
    refused(model, lambda: two.freeze(train="again"), "delta 'one' fully trains it already")
    refused(
        model, lambda: dk.attach(model, dk.IA3(at="down_proj"), train="again"), "delta 'one' fully trains it already"
    )
    randomize(one)
    one.detach()
    two.freeze(train="again")
    randomize(two)
    refused(model, one.attach, "delta 'two' fully trains it already")
    two.detach()
    same(before, snapshot(model))


def test_full_training_and_merging_do_not_share_a_weight(model):
    before = snapshot(model)
    merged = randomize(dk.attach(model, dk.LoRA(r=2, at="down_proj"), name="merged")).merge()
    other = dk.attach(model, dk.LoRA(r=2, at="up_proj"), name="other")
    match = r"layers\.\d\.mlp\.down_proj\.weight: delta 'merged' is merged into it; unmerge"
    refused(model, lambda: other.freeze(train="down_proj"), match)
    refused(model, lambda: dk.attach(model, dk.IA3(), name="third", train="down_proj"), match)
    refused(model, lambda: merged.freeze(train="norm"), r"is merged into the weights: unmerge\(\) it before training")
    merged.unmerge()
    other.freeze(train="down_proj")
    refused(model, merged.merge, r"down_proj\.weight: delta 'other' fully trains this weight")
    randomize(other)
    other.detach()
    merged.merge().detach()
    same(before, snapshot(model))


def test_a_delta_that_trains_and_merges_one_weight_itself(model):
    before = snapshot(model)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="down_proj"), train="down_proj"))
    output = model(ids())
    delta.merge()
    torch.testing.assert_close(model(ids()), output)
    delta.detach()
    same(before, snapshot(model))


def test_a_scaled_delta_trains_no_part_of_the_backbone(model):
    delta = dk.attach(model, dk.LoRA(r=2))
    delta.scale = 0.5
    refused(model, lambda: delta.freeze(train="@head"), "has the scale 0.5, .* set scale = 1 before training parts")
    delta.scale = 1
    delta.freeze(train="@head")


def test_freezing_twice_names_a_selector_once(model, tmp_path):
    delta = dk.attach(model, dk.LoRA(r=2), train="@head").freeze(train="@head").freeze(train=["@head", "norm"])
    saved = randomize(delta).save(tmp_path)
    assert json.loads((saved / "delta_config.json").read_text())["train"]["selectors"] == ["@head", "norm"]


def test_freezing_after_loading(model, tmp_path):
    randomize(dk.attach(model, dk.LoRA(r=2), train="@head")).save(tmp_path)
    dk.deltas(model)[0].detach()
    before = snapshot(model)
    loaded = dk.load(tmp_path, model)
    head = model.classifier.weight.detach().clone()
    loaded.freeze(train=["@head", "norm"])
    randomize(loaded)
    loaded.detach()
    same(before, snapshot(model))
    assert not torch.equal(loaded.state_dict()["classifier.weight"], head)
    assert "norm.weight" in loaded.state_dict()


def test_a_delta_without_a_name_is_attached_once(model, tmp_path):
    """A notebook's cell that loads a delta is run again."""
    saved = randomize(dk.attach(model, dk.LoRA(r=2))).save(tmp_path / "unnamed")
    dk.deltas(model)[0].detach()
    delta = dk.load(saved, model)
    once = model(ids())
    match = r"layers\.0\.self_attn\.q_proj: delta 'delta' has a lora there already; detach\(\) .* name="
    refused(model, lambda: dk.load(saved, model), match)
    waiting = dk.load(saved, model, attach=False)
    refused(model, waiting.attach, match)
    delta.swap(waiting).swap(waiting)
    assert torch.equal(model(ids()), once)
    delta.detach()
    assert torch.equal(waiting.attach().backbone(ids()), once)
    refused(model, delta.attach, match)
    assert dk.load(saved, model, name="second").attached


@pytest.mark.parametrize(
    ("one", "other", "where"),
    [
        ("q_proj", "q_proj.weight", "q_proj"),
        ("q_proj.weight", "q_proj", "q_proj.weight"),
        ("c_attn[q]", "c_attn", "c_attn[q]"),
        ("c_attn", "c_attn[v]", "c_attn"),
        ("c_attn.weight", "c_attn[v]", "c_attn.weight"),
    ],
)
def test_one_place_under_two_paths(model, one, other, where):
    """A module and its weight, a fused projection and its slices."""
    model = build("gpt2") if "c_attn" in one else model
    delta = dk.attach(model, dk.LoRA(r=2, at=one), train=())
    match = rf"{re.escape(where)}: delta 'delta' has a lora there already; detach\(\) .* name="
    refused(model, lambda: dk.attach(model, dk.LoRA(r=2, at=other), train=()), match)
    dk.attach(model, dk.LoRA(r=2, at=other), train=(), name="second").detach()
    delta.detach()


def test_two_places_in_one_module():
    model = build("gpt2")
    dk.attach(model, dk.LoRA(r=2, at="c_attn[q]"))
    dk.attach(model, dk.LoRA(r=2, at="c_attn[v]"))
    dk.attach(model, dk.LoRA(r=2, at="c_attn[k]"), dk.BitFit(at="c_attn"))


def test_a_saved_name_tells_two_deltas_apart(model, tmp_path):
    for name in ("one", "two"):
        randomize(dk.attach(model, dk.LoRA(r=2), name=name)).detach().save(tmp_path / name)
    for name in ("one", "two"):
        dk.load(tmp_path / name, model)
    refused(model, lambda: dk.load(tmp_path / "one", model), "a delta named 'one' is attached already; .* name=")
    dk.load(tmp_path / "one", model, name="three")
    assert [delta.name for delta in dk.deltas(model)] == ["one", "two", "three"]


def test_a_sum_without_a_name_is_not_attached_beside_its_parts(model):
    """Its effect would be added to theirs."""
    one = randomize(dk.attach(model, dk.LoRA(r=2), name="one"))
    mixed = dk.combine(model, {"one": 0.5}).delta
    refused(model, mixed.attach, "delta 'one' has a lora there already")
    one.detach()
    assert mixed.attach().attached
