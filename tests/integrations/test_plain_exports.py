"""The plain model with deltas in its weights, for whatever takes plain models."""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_model, save_model
from torch import nn

import deltakit as dk
from support.models import Transformer, ids, randomize, same, snapshot
from support.tiny_transformers import build

BATCH = torch.tensor([[5, 6, 7, 11]])


def bert_with_delta():
    model = build("bert", tf.AutoModelForSequenceClassification)
    return model, randomize(dk.attach(model, dk.LoRA(r=3), dk.BitFit(at="@ff.up"), train="@head"))


def test_the_merged_state_dict_is_that_of_the_merged_model():
    model, delta = bert_with_delta()
    expected = model(BATCH).logits
    before = snapshot(model)
    state = dk.merged_state_dict(model)
    same(before, snapshot(model))
    plain = build("bert", tf.AutoModelForSequenceClassification)
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain(BATCH).logits, expected)
    delta.merge_and_unload()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_several_deltas_at_one_weight_and_one_that_is_not_active():
    torch.manual_seed(3)
    model = Transformer().double().eval()
    for name in ("one", "two", "off"):
        randomize(dk.attach(model, dk.LoRA(r=2, at="q_proj"), name=name))
    off = dk.deltas(model)[2]
    off.active = False
    expected = model(ids())
    plain = Transformer().double().eval()
    plain.load_state_dict(dk.merged_state_dict(model))
    torch.testing.assert_close(plain(ids()), expected)
    dk.deltas(model)[0].merge()
    dk.deltas(model)[1].detach()
    plain.load_state_dict(dk.merged_state_dict(model))
    torch.testing.assert_close(plain(ids()), model(ids()))


def test_what_cannot_be_merged():
    model = Transformer()
    dk.attach(model, dk.Prefix(tokens=2))
    with pytest.raises(dk.TargetError, match="does not change weights, so it cannot be merged"):
        dk.merged_state_dict(model)


def test_the_base_state_dict_is_the_bare_backbone_s_beside_everything():
    model = build("gpt2", tf.AutoModelForCausalLM)
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    one = randomize(dk.attach(model, dk.LoRA(r=2, at="attn.c_proj"), name="one", train="transformer.ln_f"))
    two = randomize(dk.attach(model, dk.BitFit(at="mlp.c_fc"), name="two"))
    for change in (one.merge, two.merge, one.unmerge, two.detach):
        change()
        found = dk.base_state_dict(model)
        assert found.keys() == bare.keys()
        assert all(torch.equal(value, bare[name]) for name, value in found.items())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_the_plain_model_is_exported_quantized_and_saved(tmp_path):
    model, delta = bert_with_delta()
    expected = model(BATCH).logits
    plain = delta.merge_and_unload()
    torch.testing.assert_close(plain(BATCH).logits, expected)
    merged = plain(BATCH).logits
    program = torch.export.export(plain, (BATCH,))
    torch.testing.assert_close(program.module()(BATCH).logits, merged)
    quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert (quantized(BATCH).logits - merged).abs().max() < 0.1
    save_model(plain, tmp_path / "plain.safetensors")
    other = build("bert", tf.AutoModelForSequenceClassification)
    load_model(other, tmp_path / "plain.safetensors", strict=True)
    assert torch.equal(other(BATCH).logits, merged)
    plain.save_pretrained(tmp_path)
    again, info = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.eval()(BATCH).logits, merged)
