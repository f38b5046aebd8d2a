"""The folders that OpenDelta itself saved (`benchmarks/opendelta_files.py`), their backbones, and OpenDelta's logits."""

import torch
import transformers as tf
from safetensors.torch import load_file

from support.paths import CHECKPOINTS

FILES = CHECKPOINTS / "opendelta"
COMMON = {"vocab_size": 19, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
T5 = {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0}
BACKBONES = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES, **COMMON, max_position_embeddings=32)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, **COMMON)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=12, n_layer=2, n_head=3, n_positions=32, **COMMON)),
}
CASES = [(path.parent.parent.name, path.parent.name) for path in sorted(FILES.glob("*/*/config.json"))]


def backbone(name):
    model = BACKBONES[name]().eval()
    state = load_file(FILES / name / "backbone.safetensors")
    # A buffer that transformers does not save any more.
    state.pop("bert.embeddings.position_ids", None)
    model.load_state_dict(state)
    return model


def known(name):
    """The arguments of the call, and the logits by case."""
    tensors = load_file(FILES / name / "expected.safetensors")
    expected = {key.removeprefix("expected."): value for key, value in tensors.items() if key.startswith("expected.")}
    return {key: value for key, value in tensors.items() if not key.startswith("expected.")}, expected


def logits(model, call):
    with torch.no_grad():
        return model(**call).logits
