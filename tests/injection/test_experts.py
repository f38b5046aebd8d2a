"""Experts whose weights are stacks of matrices in one parameter."""

import copy

import pytest
import torch
import transformers as tf

import deltakit as dk
from support.backbone_inputs import hidden, inputs
from support.changed_weights import check_against_changed_weights
from support.models import randomize, same, snapshot
from support.tiny_transformers import COMMON, SIZES, build


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_that_are_parameters(kind):
    if kind == "mixtral":
        model = build(kind).double()
        # The grouped kernel has no float64.
        model.set_experts_implementation("eager")
    else:
        config = tf.GptOssConfig(
            **SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2, **COMMON
        )
        model = tf.AutoModel.from_config(config, attn_implementation="eager").eval().double()
        model.set_experts_implementation("eager")
    batch = inputs("llama", model)
    experts = [f"layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]
    check_against_changed_weights(model, lambda m: hidden(m(**batch)), dk.LoRA(r=2, at="@ff.{gate_up,down}"), experts)
    delta = dk.attach(model, dk.LoRA(r=2, at="experts.down_proj"))
    shape = model.layers[0].mlp.experts.down_proj.shape
    flipped = kind == "gpt_oss"
    assert delta.modules[experts[1]][0].A.shape == (3, 2, shape[1] if flipped else shape[2])


def test_experts_merge_and_come_out_again_exactly():
    model = build("mixtral")
    batch = inputs("mixtral", model)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="@ff.down")))
    attached = hidden(model(**batch))
    before = snapshot(model)
    delta.merge()
    torch.testing.assert_close(hidden(model(**batch)), attached, rtol=1e-4, atol=1e-5)
    delta.unmerge()
    same(before, snapshot(model))
    assert "weight patch" in repr(delta)


def test_two_deltas_in_one_weight_add_up():
    model = build("mixtral")
    batch = inputs("mixtral", model)
    bare = hidden(model(**batch))
    one = randomize(dk.attach(model, dk.LoRA(r=2, at="experts.down_proj")))
    two = randomize(dk.attach(model, dk.LoRA(r=3, at="experts.down_proj"), name="two"))
    together = hidden(model(**batch))
    other = copy.deepcopy(model)
    first, second = dk.deltas(other)
    first.merge()
    second.active = False
    assert not torch.allclose(hidden(other(**batch)), together)
    second.active = True
    torch.testing.assert_close(hidden(other(**batch)), together, rtol=1e-4, atol=1e-5)
    one.active = two.active = False
    assert torch.equal(hidden(model(**batch)), bare)
