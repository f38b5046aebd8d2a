"""Tiny backbones of transformers' architectures, built from configs with random weights."""

import torch
import transformers as tf

COMMON = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
BART = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 52, "decoder_ffn_dim": 44} | {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 2,
}
T5 = {"d_model": 24, "d_kv": 5, "d_ff": 52, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VISION = {**SIZES, "image_size": 12, "patch_size": 4}
CLIP = {"text_config": {**SIZES, **COMMON}, "vision_config": {**VISION, "hidden_size": 28, "num_hidden_layers": 3}}
WHISPER = BART | {"num_mel_bins": 7, "max_source_positions": 11, "max_target_positions": 13} | COMMON

CONFIGS = {
    "bert": lambda: tf.BertConfig(**SIZES, **COMMON),
    "roberta": lambda: tf.RobertaConfig(**SIZES, **COMMON),
    "distilbert": lambda: tf.DistilBertConfig(dim=24, n_layers=2, n_heads=4, hidden_dim=52, **COMMON),
    "electra": lambda: tf.ElectraConfig(embedding_size=24, **SIZES, **COMMON),
    "albert": lambda: tf.AlbertConfig(embedding_size=12, **SIZES, **COMMON),
    "deberta-v2": lambda: tf.DebertaV2Config(**SIZES, **COMMON),
    "gpt2": lambda: tf.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_inner=52, **COMMON),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES, **COMMON),
    "gptj": lambda: tf.GPTJConfig(n_embd=24, n_layer=2, n_head=4, n_inner=52, rotary_dim=2, **COMMON),
    "opt": lambda: tf.OPTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=52, word_embed_proj_dim=24, **COMMON
    ),
    "bloom": lambda: tf.BloomConfig(hidden_size=24, n_layer=2, n_head=4, **COMMON),
    "falcon": lambda: tf.FalconConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, **COMMON),
    "llama": lambda: tf.LlamaConfig(**GROUPED, **COMMON),
    "mistral": lambda: tf.MistralConfig(**GROUPED, **COMMON),
    "qwen2": lambda: tf.Qwen2Config(**SIZES, num_key_value_heads=2, **COMMON),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, **COMMON),
    "gemma": lambda: tf.GemmaConfig(**GROUPED, **COMMON),
    "gemma2": lambda: tf.Gemma2Config(**GROUPED, **COMMON),
    "gemma3_text": lambda: tf.Gemma3TextConfig(**GROUPED, **COMMON),
    "phi": lambda: tf.PhiConfig(**SIZES, partial_rotary_factor=2 / 3, **COMMON),
    "phi3": lambda: tf.Phi3Config(**SIZES, num_key_value_heads=2, **COMMON),
    "mixtral": lambda: tf.MixtralConfig(**GROUPED, num_local_experts=3, **COMMON),
    "t5": lambda: tf.T5Config(**T5, **COMMON),
    "mt5": lambda: tf.MT5Config(**T5, **COMMON),
    "bart": lambda: tf.BartConfig(**BART, max_position_embeddings=64, **COMMON),
    "pegasus": lambda: tf.PegasusConfig(**BART, max_position_embeddings=64, **COMMON),
    "whisper": lambda: tf.WhisperConfig(**WHISPER),
    "vit": lambda: tf.ViTConfig(**VISION),
    "deit": lambda: tf.DeiTConfig(**VISION),
    "beit": lambda: tf.BeitConfig(**VISION),
    "clip": lambda: tf.CLIPConfig(**CLIP),
}


def build(kind, auto=tf.AutoModel, **changes):
    """A tiny model of a model type, in evaluation mode; `auto` picks the head, `changes` are made to its config."""
    torch.manual_seed(1)
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    return auto.from_config(config).eval()
