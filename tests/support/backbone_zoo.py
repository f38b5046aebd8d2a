"""Tiny backbones of many kinds with inputs that they take: transformers' types from shrunken configs, and plain torch."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Whatever of these a config has is set to this.
SMALL = {
    **dict.fromkeys(("vocab_size", "n_vocab"), 97),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "dff"), 52),
    **dict.fromkeys(
        ("decoder_ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 44
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    "max_position_embeddings": 64,
    "n_positions": 64,
    "num_mel_bins": 7,
    "max_source_positions": 11,
    "image_size": 12,
    "patch_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Backbone:
    """How to build one backbone: the kind it stands for, and what its config needs beyond `SMALL`.

    `cached`: whether the bare model generates the same with its cache as without.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    cached: bool = True
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]] | None = None


def shrunken(model_type: str, options: dict[str, Any]) -> Any:
    """The config of a model type at toy size."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    parts = {name: _taken(value) for name, value in vars(default).items() if isinstance(value, tf.PreTrainedConfig)}
    return kind(**{**_taken(default), **parts, **options})


def _taken(default: Any) -> dict[str, Any]:
    """What of `SMALL` a config has; an alias and the name it stands for must not both be given."""
    aliases = getattr(type(default), "attribute_map", {})
    return {
        n: v for n, v in SMALL.items() if n not in aliases and not isinstance(getattr(default, n, []), list | tuple)
    }


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """A backbone in evaluation mode, and what calls one like it and gives all that it computed as one vector."""
    torch.manual_seed(1)
    backbone = ZOO[name]
    if backbone.make is not None:
        model, call = backbone.make()
        return model.eval(), call
    config = shrunken(name, backbone.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _auto(config).from_config(config).eval()
    batch = inputs(model, config)
    if "use_cache" in vars(config):
        # Results are compared, and RWKV changes its state in place, which no gradient survives.
        model.config.use_cache = False

    def call(m: nn.Module) -> torch.Tensor:
        with torch.random.fork_rng():  # vit_mae draws the patches it masks
            torch.manual_seed(0)
            return computed(m(**batch))

    return model, call


def _auto(config: Any) -> Any:
    if type(config) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return tf.AutoModelForSeq2SeqLM
    if type(config) in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        return tf.AutoModelForSpeechSeq2Seq
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and generates(config):
        return tf.AutoModelForCausalLM
    return tf.AutoModel


def generates(config: Any) -> bool:
    """Whether a config is that of a decoder that was made for generation."""
    masked = type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    causal = type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and not masked
    seq2seq = type(config) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    speech = type(config) in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    return causal or seq2seq or speech


def inputs(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """What a model of transformers is called with."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (2, 8), generator=generator)
    batch: dict[str, torch.Tensor] = {}
    main = model.main_input_name
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = torch.randn(2, 3, *[getattr(config, "image_size", 12)] * 2, generator=generator)
    if main == "input_ids":
        batch |= text
    elif main == "pixel_values":
        batch["pixel_values"] = pixels
    elif main == "input_values":
        batch["input_values"] = torch.randn(2, 600, generator=generator)
    elif main == "input_features":
        batch["input_features"] = torch.randn(2, config.num_mel_bins, 22, generator=generator)
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :5]
    tower = getattr(config, "vision_config", getattr(config, "image_config", None))
    if tower is not None and main != "pixel_values":
        size = tower.image_size
        batch["pixel_values"] = torch.randn(2, 3, size, size, generator=generator)
    if hasattr(config, "text_config") and main == "pixel_values":
        batch |= text
    return batch


def computed(output: Any) -> torch.Tensor:
    """Every floating-point tensor in a result, as one vector."""
    if isinstance(output, torch.Tensor):
        return output.flatten() if output.is_floating_point() else output.new_zeros(0, dtype=torch.float32)
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    parts = [computed(value) for value in values]
    return torch.cat(parts) if parts else torch.zeros(0)


class TimmViT(nn.Module):
    """A vision transformer with timm's names and its fused `qkv`, written from its published structure."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 24, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        self.blocks = nn.Sequential(*(TimmBlock() for _ in range(2)))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(24), TimmAttention()
        self.norm2, self.mlp = nn.LayerNorm(24), TimmMlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class TimmMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 52), nn.Linear(52, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Tagger(nn.Module):
    """Words to tags by a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(97, 12), nn.LSTM(12, 7, bidirectional=True, batch_first=True)
        self.classifier = nn.Linear(14, 5)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.lstm(self.words(input_ids))[0])


def _torch_transformer() -> Any:
    model = nn.Transformer(24, 4, 2, 2, 52, batch_first=True)
    x, y = torch.randn(2, 6, 24), torch.randn(2, 5, 24)
    return model, lambda m: m(x, y).flatten()


def _timm_vit() -> Any:
    x = torch.randn(2, 3, 12, 12)
    return TimmViT(), lambda m: m(x).flatten()


def _tagger() -> Any:
    ids = torch.randint(3, 97, (2, 6))
    return Tagger(), lambda m: m(ids).flatten()


def _mlp() -> Any:
    x = torch.randn(3, 12)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)), lambda m: m(x).flatten()


def _many(kind: str, *names: str, **options: Any) -> dict[str, Backbone]:
    return {name: Backbone(kind, options) for name in names}


_STAGES = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 3, "image_size": 24, "patch_size": 2}
_PYRAMID = {"num_attention_heads": [1, 2, 4, 4], "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7}

ZOO: dict[str, Backbone] = {
    **_many(
        "encoder", "bert", "roberta", "distilbert", "electra", "albert", "deberta", "deberta-v2", "mpnet", "modernbert"
    ),
    **_many(
        "encoder", "squeezebert", "convbert", "fnet", "esm", "roformer", "nomic_bert", "ernie", "megatron-bert", "ibert"
    ),
    **_many(
        "decoder", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "llama", "mistral", "qwen2", "phi3", "gpt_bigcode"
    ),
    **_many(
        "decoder", "mpt", "stablelm", "starcoder2", "olmo2", "cohere", "persimmon", "phi", "granite", "biogpt", "ctrl"
    ),
    **_many("decoder", "openai-gpt", "exaone4", "nemotron"),
    **_many("decoder", "qwen3", "gemma", "gemma2", "gemma3_text", "glm4", head_dim=8),
    **_many("decoder", "gptj", "codegen", rotary_dim=8),
    **_many("mixture of experts", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe"),
    "gpt_oss": Backbone("mixture of experts", {"head_dim": 8}),
    "jetmoe": Backbone("mixture of experts", {"kv_channels": 8}),
    "deepseek_v3": Backbone(
        "mixture of experts",
        {**_LATENT, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    **_many("state space", "mamba", "falcon_mamba"),
    # Bare, and with weights of usual size, RWKV of transformers 5.23 differs from itself from the second token on.
    "rwkv": Backbone("state space", cached=False),
    "mamba2": Backbone("state space", {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2}),
    **_many("hybrid", "lfm2", "olmo_hybrid"),
    "falcon_h1": Backbone(
        "hybrid",
        {
            "head_dim": 8,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
        },
    ),
    "jamba": Backbone("hybrid", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    **_many("encoder-decoder", "t5", "mt5", "umt5", "longt5", "switch_transformers", d_kv=8, num_layers=2),
    **_many("encoder-decoder", "bart", "pegasus", "mbart", "m2m_100", "blenderbot", "marian", "plbart"),
    **_many("vision", "vit", "deit", "beit", "dinov2", "vit_mae", "data2vec-vision", "ijepa", "vit_msn", "dpt"),
    "swin": Backbone("vision", _STAGES),
    **_many("vision", "segformer", "pvt", **_PYRAMID, image_size=32),
    **_many("convolutional", "resnet", "regnet", hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, image_size=32),
    # The default layer scale of 1e-6 hides in float32 what a training step changes inside a block.
    "convnext": Backbone(
        "convolutional",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 32, "num_stages": 2, "layer_scale_init_value": 0.5},
    ),
    "poolformer": Backbone(
        "convolutional",
        {
            "hidden_sizes": [8, 12, 16, 20],
            "depths": [1, 1, 1, 1],
            "image_size": 64,
            "patch_size": 7,
            "layer_scale_init_value": 1.0,
        },
    ),
    **_many("audio", "wav2vec2", "hubert", "wavlm", "unispeech", conv_dim=[16] * 7, num_conv_pos_embedding_groups=4),
    "whisper": Backbone("audio", {"max_target_positions": 13}),
    **_many("multimodal", "clip", "siglip", "blip", "chinese_clip", "owlvit", "flava"),
    "torch.nn.Transformer": Backbone("plain torch", make=_torch_transformer),
    "timm-like ViT": Backbone("plain torch", make=_timm_vit),
    "LSTM tagger": Backbone("plain torch", make=_tagger),
    "MLP": Backbone("plain torch", make=_mlp),
}
"""By name; a model type of transformers unless it is made by hand."""
