"""`merge_and_unload`: a plain model with the delta in its weights."""

import copy

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from support.interruptions import interrupted, lines_of
from support.models import Transformer, ids, randomize, snapshot
from support.tiny_transformers import build


def hooks(model):
    return [
        hook
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks, module._load_state_dict_pre_hooks)
        for hook in table.values()
    ]


def test_a_plain_model_is_left():
    model = Transformer().double().eval()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    keys = list(model.state_dict())
    delta = randomize(dk.attach(model, dk.LoRA(r=2), dk.BitFit(at="@ff.up"), train="@head"), 0.3)
    expected = model(ids())
    assert delta.merge_and_unload() is model
    torch.testing.assert_close(model(ids()), expected)
    assert not hooks(model)
    assert not dk.deltas(model)
    assert list(model.state_dict()) == keys
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    delta.detach()
    torch.testing.assert_close(model(ids()), expected)
    with pytest.raises(
        dk.StateError, match=r"in the backbone's weights for good \(merge_and_unload\), and would apply twice"
    ):
        delta.attach()


def test_it_can_be_saved_before_and_after(tmp_path):
    torch.manual_seed(3)
    model = Transformer().eval()
    delta = randomize(dk.attach(model, dk.LoRA(r=2), train="@head"))
    delta.save(tmp_path / "before")
    delta.merge().merge_and_unload()
    delta.save(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "delta_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_saved_after_fits_the_bare_backbone(tmp_path):
    torch.manual_seed(3)
    model = Transformer().double().eval()
    fresh = copy.deepcopy(model)
    delta = randomize(dk.attach(model, dk.LoRA(r=2), train="@head"), 0.3)
    expected = model(ids())
    delta.merge_and_unload()
    delta.save(tmp_path / "after")
    dk.load(tmp_path / "after", fresh)
    torch.testing.assert_close(fresh(ids()), expected)
    for again in (delta.attach, delta.merge, delta.merge_and_unload, lambda: setattr(delta, "active", True)):
        with pytest.raises(dk.StateError, match="in the backbone's weights for good"):
            again()


def test_what_transformers_saves_is_a_plain_model(tmp_path):
    model = build("llama", tf.AutoModelForCausalLM)
    tokens = torch.tensor([[5, 6, 7]])
    delta = randomize(dk.attach(model, dk.LoRA(r=2)), 0.3)
    delta.merge_and_unload().save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_running_statistics_stay():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="0")))
    x = torch.randn(4, 3, 7, 7)
    for _ in range(3):
        model(x).square().mean().backward()
    moved = model[1].running_mean.clone()
    expected = model.eval()(x)
    delta.merge_and_unload()
    assert torch.equal(model[1].running_mean, moved)
    torch.testing.assert_close(model(x), expected)
    # They are the backbone's own now: the next delta that comes and goes leaves them.
    dk.attach(model, dk.LoRA(r=2, at="0")).detach()
    assert torch.equal(model[1].running_mean, moved)


def test_beside_another_delta():
    model = Transformer().double().eval()
    one = randomize(dk.attach(model, dk.LoRA(r=2, at="q_proj"), name="one"), 0.3)
    two = randomize(dk.attach(model, dk.LoRA(r=2, at="v_proj"), name="two"), 0.3)
    both = model(ids())
    one.merge_and_unload()
    torch.testing.assert_close(model(ids()), both)
    two.detach()
    assert not hooks(model)
    assert not torch.allclose(model(ids()), both)


def test_what_cannot_be_merged_stays_as_it_is():
    model = Transformer().eval()
    delta = dk.attach(model, dk.Prefix(tokens=2))
    before = snapshot(model)
    with pytest.raises(dk.TargetError, match="does not change weights, so it cannot be merged"):
        delta.merge_and_unload()
    assert snapshot(model).keys() == before.keys()
    assert delta.attached


def test_an_interruption_leaves_it_whole_or_gone():
    def attached():
        torch.manual_seed(3)
        model = Transformer(blocks=1).double().eval()
        delta = randomize(dk.attach(model, dk.LoRA(r=2), train="@head"), 0.3)
        return model, delta.merge()

    model, delta = attached()
    expected = model(ids())
    for line in lines_of(delta.merge_and_unload, 40):
        model, delta = attached()
        interrupted(delta.merge_and_unload, line)
        torch.testing.assert_close(model(ids()), expected)
        assert delta.merged or not hooks(model)
