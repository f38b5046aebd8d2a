"""LLaMA-Adapters that are saved as PEFT's adaption prompts: PEFT opens them, with the outputs that the delta gave."""

import json

import pytest
import torch
import transformers as tf

import deltakit as dk
from support.models import randomize
from support.peft_models import opened
from support.tiny_transformers import build

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TEXT = torch.arange(3, 17).view(2, 7)


def backbone(kind="llama", **changes):
    return build(kind, tf.AutoModelForCausalLM, **{"num_hidden_layers": 3, "head_dim": 6, **changes})


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_peft_opens_it(kind, tmp_path):
    model = backbone(kind)
    bare = model(TEXT).logits
    delta = randomize(dk.attach(model, dk.LlamaAdapter(tokens=3, layers=2)), 1.0)
    expected = model(TEXT).logits
    assert (expected - bare).abs().max() > 1e-3
    delta.save(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_modules"], config["adapter_len"], config["adapter_layers"]) == ("self_attn", 3, 2)
    torch.testing.assert_close(opened(backbone(kind), tmp_path)(input_ids=TEXT).logits, expected, rtol=1e-5, atol=1e-5)
    again = backbone(kind)
    loaded = dk.load(tmp_path, again)
    assert loaded.modules.keys() == delta.modules.keys()
    assert torch.equal(again(TEXT).logits, expected)


REFUSED = {
    "a model": (lambda: build("gpt2", tf.AutoModelForCausalLM), {}, "PEFT has adaption prompts for llama and mistral, and this model is gpt2"),
    "layers": (backbone, {"at": "layers.1.self_attn"}, "PEFT has prompts in the last layers, and model.layers.2.self_attn has none"),
    "heads": (lambda: backbone(head_dim=8), {}, r"PEFT takes 24 // 16, the sizes of model.layers.0.self_attn.k_proj, for the number of heads that share one key, and there are 4 heads and 2 keys"),
    "a bias": (lambda: backbone(attention_bias=True), {}, "model.layers.0.self_attn.o_proj has a bias, which PEFT would add twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_express(case, tmp_path):
    make, options, message = REFUSED[case]
    delta = randomize(dk.attach(make(), dk.LlamaAdapter(tokens=3, **options)))
    with pytest.raises(dk.CheckpointError, match=f"cannot be saved as an adapter of PEFT: {message}"):
        delta.save(tmp_path, format="peft")


def test_two_lengths_and_what_is_fully_trained(tmp_path):
    model = backbone()
    two = [dk.LlamaAdapter(tokens=tokens, at=f"layers.{layer}.self_attn") for tokens, layer in ((3, 1), (5, 2))]
    delta = randomize(dk.attach(model, *two))
    with pytest.raises(dk.CheckpointError, match="its prompts have 3 and 5 tokens, and PEFT has one length for all"):
        delta.save(tmp_path, format="peft")
    delta.detach()
    delta = randomize(dk.attach(model, dk.LlamaAdapter(tokens=3), train="@head", name="whole"))
    with pytest.raises(dk.CheckpointError, match="it trains lm_head.weight, and PEFT trains nothing beside them"):
        delta.save(tmp_path, format="peft")
