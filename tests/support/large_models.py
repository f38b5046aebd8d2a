"""Well-known models at full size, on the meta device, each with the delta with which its tree is shown."""

import torch
import transformers as tf
from torch import nn

import deltakit as dk


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(512, 768, bias=False), nn.Linear(512, 768, bias=False)
        self.down_proj = nn.Linear(768, 512, bias=False)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(512, 128, bias=False), nn.ModuleList(Expert() for _ in range(128))


LLAMA = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
T5 = {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "d_kv": 64, "vocab_size": 32100}
WHISPER = {
    "d_model": 1280,
    "encoder_layers": 32,
    "decoder_layers": 32,
    "encoder_attention_heads": 20,
    "decoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "decoder_ffn_dim": 5120,
}

MODELS = {
    "t5_large": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), dk.LoRA(r=8, at="{q,v}")),
    "llama_70b": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), dk.LoRA(r=8, at="{q,v}_proj")),
    "mixtral_8x7b": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig()), dk.LoRA(r=8, at="{q,v}_proj")),
    "128_experts": (lambda: nn.ModuleList(Experts() for _ in range(4)), dk.LoRA(r=8, at="{up,down}_proj")),
    "resnet_50": (lambda: tf.ResNetForImageClassification(tf.ResNetConfig()), None),
    "clip_base": (lambda: tf.CLIPModel(tf.CLIPConfig()), None),
    "whisper_large": (lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)), None),
}


def with_delta(name):
    """A model of `MODELS` with its delta."""
    make, method = MODELS[name]
    with torch.device("meta"):
        model = make()
    if method is not None:
        dk.attach(model, method)
    return model
