"""Merging a delta into the weights and taking it out again, and what merging refuses."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import Kinds, Transformer, a_layer_of_each_kind, attached, randomize, same, snapshot
from support.tiny_transformers import build


def test_merging_into_what_is_no_parameter_is_an_error():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)))
    delta = dk.attach(model, dk.LoRA(r=2, at="0"))
    with pytest.raises(
        dk.TargetError, match=r"0\.weight: the backbone has no parameter of this name to merge into.*weight_norm"
    ):
        delta.merge()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_merged_and_hooked_agree(dtype, tolerance):
    model, x = a_layer_of_each_kind()
    model = model.to(dtype)
    before = snapshot(model)
    delta = attached(model, dk.LoRA(r=3, at=Kinds.NAMES))
    hooked = model(x)
    assert (delta.merge().backbone(x) - hooked).abs().max() <= tolerance * hooked.abs().max()
    delta.detach()
    same(before, snapshot(model))


def test_merging_refuses_what_it_would_harm():
    model = build("gpt2", tf.AutoModelForCausalLM)
    delta = attached(model, dk.LoRA(r=3, at="wte", untie=True))
    with pytest.raises(dk.StateError, match=r"wte\.weight is tied to lm_head\.weight: merging would change both"):
        delta.merge()
    delta.detach()
    one = attached(model, dk.LoRA(r=3, at="@attn.qkv"))
    two = attached(model, dk.LoRA(r=2, at="@attn.qkv"), name="two")
    one.merge()
    with pytest.raises(dk.StateError, match="delta 'delta' is merged into it; unmerge.. that delta first"):
        two.merge()
    two.active = False
    with pytest.raises(
        dk.StateError,
        match="only a delta that is attached, active and not merged can be merged; it is attached, not active",
    ):
        two.merge()
    with pytest.raises(dk.StateError, match="'two' is not merged"):
        two.unmerge()


def test_the_bare_state_while_merged():
    model = Transformer().eval()
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    delta = randomize(dk.attach(model, dk.LoRA(r=2))).merge()
    torch.testing.assert_close(dk.base_state_dict(model), bare, rtol=0, atol=0)
    with pytest.raises(dk.StateError, match=r"q_proj\.weight: delta 'delta' is merged into this weight, and unmerging"):
        model.load_state_dict(bare)
    delta.unmerge()
    model.load_state_dict(bare)
