"""The numbers of parameters that OpenDelta's classes train by default: OpenDelta's own, measured with its last version."""

import pytest
import torch
import transformers as tf

import deltakit as dk

SIZES = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "max_position_embeddings": 32
}
BERT = {**SIZES, "intermediate_size": 128}
MODELS = {
    "bert": (tf.BertForSequenceClassification, lambda: tf.BertConfig(**BERT)),
    "deberta-v2": (
        tf.DebertaV2ForSequenceClassification,
        lambda: tf.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    ),
    "gpt2": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=32)),
    "opt": (tf.OPTForCausalLM, lambda: tf.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64)),
    "t5": (
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    ),
}
# OpenDelta's LoRA finds nothing on GPT-2, and its BitFit gives T5's 12 norms a bias of 64 in the first forward only.
COUNTS = {
    "bert": {"lora": 4096, "adapter": 12640, "bitfit": 1152, "prefix": 1536, "soft_prompt": 6400},
    "deberta-v2": {"lora": 4096, "adapter": 12640, "bitfit": 1152, "soft_prompt": 6400},
    "gpt2": {"adapter": 12640, "bitfit": 1472, "prefix": 1536, "soft_prompt": 6400},
    "opt": {"lora": 4096, "adapter": 12640, "bitfit": 1152, "soft_prompt": 6400},
    "t5": {"lora": 8192, "adapter": 25280, "bitfit": 1792 + 12 * 64, "prefix": 3072, "soft_prompt": 6400},
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in COUNTS for kind in COUNTS[name]])
def test_default_counts(name, kind):
    made, config = MODELS[name]
    with torch.device("meta"):
        model = made(config())
    options = {"reparameterize": False} if kind == "prefix" else {}
    config = dk.AutoDeltaConfig.from_dict({"delta_type": kind, **options})
    assert dk.AutoDeltaModel.from_config(config, backbone_model=model).delta.num_parameters == COUNTS[name][kind]


def test_a_container_by_name():
    """OpenDelta's scripts name containers; its BitFit trains the biases of the layers in them."""
    made, config = MODELS["bert"]
    assert dk.BitFitModel(made(config()), modified_modules=["attention"]).delta.num_parameters == 2 * 5 * 64
    assert dk.BitFitModel(made(config()), modified_modules=["encoder"]).delta.num_parameters == 1152
