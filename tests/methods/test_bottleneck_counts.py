"""The numbers of parameters that OpenDelta's adapters have with their default options: OpenDelta's own, measured."""

import pytest
import torch
import transformers as tf

import deltakit as dk

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
MODELS = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
}
# OpenDelta has no adapters on cross-attention.
AT = {"bert": None, "gpt2": None, "t5": ["SelfAttention.o", "wo"]}
BESIDE = {"bert": ["@attn", "@ff.down"], "gpt2": ["@attn", "@ff"], "t5": ["layer.0.SelfAttention", "@ff"]}


@pytest.mark.parametrize(("name", "times"), [("bert", 1), ("gpt2", 1), ("t5", 2)])
@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda name: dk.Adapter(size=24, at=AT[name]), 12640),
        (lambda name: dk.ParallelAdapter(size=24, at=BESIDE[name]), 12640),
        (lambda name: dk.LowRankAdapter(at=AT[name]), 792),
        (lambda name: dk.Compacter(reduction=16, shared_rule=False, at=AT[name]), 1328),
    ],
)
def test_counts(name, times, make, count):
    with torch.device("meta"):
        model = MODELS[name]()
    assert dk.plan(model, make(name)).num_parameters == count * times
