"""Roles on real architectures: by hand for the first block, by shapes for all."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.core.linear import linear_sizes
from deltakit.selection.role_inference.infer import infer_roles
from support.tiny_transformers import CONFIGS, build

BERT = {
    "attn": {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
    },
    "ff": {"up": "intermediate.dense", "down": "output.dense"},
}
LLAMA = {
    "attn": {part: f"self_attn.{part}_proj" for part in "qkvo"},
    "ff": {part: f"mlp.{part}_proj" for part in ("up", "gate", "down")},
}
BART = {
    "attn": {**{part: f"self_attn.{part}_proj" for part in "qkv"}, "o": "self_attn.out_proj"},
    "ff": {"up": "fc1", "down": "fc2"},
}
NEOX = {
    "attn": {"qkv": "attention.query_key_value", "o": "attention.dense"},
    "ff": {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
}
BY_HAND = {
    "bert": ("encoder.layer.0", BERT),
    "roberta": ("encoder.layer.0", BERT),
    "distilbert": (
        "transformer.layer.0",
        {
            "attn": {k: f"attention.{k if k != 'o' else 'out'}_lin" for k in "qkvo"},
            "ff": {"up": "ffn.lin1", "down": "ffn.lin2"},
        },
    ),
    "gpt2": (
        "h.0",
        {"attn": {"qkv": "attn.c_attn", "o": "attn.c_proj"}, "ff": {"up": "mlp.c_fc", "down": "mlp.c_proj"}},
    ),
    "gpt_neox": ("layers.0", NEOX),
    "bloom": (
        "h.0",
        {k: {p: v.replace("attention.", "self_attention.") for p, v in u.items()} for k, u in NEOX.items()},
    ),
    "opt": ("decoder.layers.0", BART),
    "llama": ("layers.0", LLAMA),
    "qwen2": ("layers.0", LLAMA),
    "gemma": ("layers.0", LLAMA),
    "mixtral": (
        "layers.0",
        {"attn": LLAMA["attn"], "ff": {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}},
    ),
    "phi3": (
        "layers.0",
        {
            "attn": {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj"},
            "ff": {"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
        },
    ),
    "t5": (
        "encoder.block.0",
        {
            "attn": {part: f"layer.0.SelfAttention.{part}" for part in "qkvo"},
            "ff": {"up": "layer.1.DenseReluDense.wi", "down": "layer.1.DenseReluDense.wo"},
        },
    ),
    "bart": ("encoder.layers.0", BART),
    "whisper": ("encoder.layers.0", BART),
    "vit": (
        "layers.0",
        {"attn": {part: f"attention.{part}_proj" for part in "qkvo"}, "ff": {"up": "mlp.fc1", "down": "mlp.fc2"}},
    ),
    "clip": ("text_model.encoder.layers.0", {"attn": BART["attn"], "ff": {"up": "mlp.fc1", "down": "mlp.fc2"}}),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_the_first_block_by_hand(kind):
    block, wanted = BY_HAND[kind]
    units = [unit for unit in infer_roles(build(kind)).units if f"{unit.path}.".startswith(f"{block}.")]
    found = {unit.kind: {part: path.removeprefix(f"{block}.") for part, path in unit.parts.items()} for unit in units}
    assert found == wanted


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_block_has_the_same_parts_of_the_right_shapes(kind):
    model = build(kind)
    roles = infer_roles(model)
    assert len(roles.blocks) == {"albert": 1, "clip": 5}.get(kind, 4 if model.config.is_encoder_decoder else 2)
    size = {name: linear_sizes(module) for name, module in model.named_modules()}
    for unit in roles.units:
        parts = {part: size[path] for part, path in unit.parts.items() if path in size}
        if unit.kind == "attn":
            assert "o" in parts
            assert parts.keys() >= {"q", "k", "v"} or "qkv" in parts
            assert all(parts[part][0] == unit.width for part in parts.keys() - {"o"})
            assert parts["o"][1] == unit.width
        elif kind != "mixtral":
            assert parts["down"][1] == unit.width
            assert all(parts[part][0] == unit.width for part in parts.keys() - {"down"})
            assert all(parts[part][1] == parts["down"][0] for part in parts.keys() & {"up", "gate"})
    for kind_of_unit in ("attn", "ff"):
        shapes = {tuple(sorted(unit.parts)) for unit in roles.units if unit.kind == kind_of_unit}
        assert len(shapes) == 1


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", [dk.LoRA(r=2), dk.Adapter(size=3), dk.BitFit()], ids=lambda method: method.name)
def test_defaults_attach_in_every_block(kind, method):
    model = build(kind)
    delta = dk.attach(model, method)
    for block in infer_roles(model).blocks:
        assert any(path.startswith(f"{block}.") for path in delta.modules)
    delta.detach()


@pytest.mark.parametrize(
    ("kind", "auto", "head"),
    [
        ("bert", tf.AutoModelForSequenceClassification, ("classifier",)),
        ("distilbert", tf.AutoModelForSequenceClassification, ("pre_classifier", "classifier")),
        ("gpt2", tf.AutoModelForSequenceClassification, ("score",)),
        ("llama", tf.AutoModelForSequenceClassification, ("score",)),
        ("bart", tf.AutoModelForSequenceClassification, ("classification_head",)),
        ("vit", tf.AutoModelForImageClassification, ("classifier",)),
        ("gpt2", tf.AutoModelForCausalLM, ("lm_head",)),
        ("t5", tf.AutoModelForSeq2SeqLM, ("lm_head",)),
        ("bert", tf.AutoModel, ()),
    ],
)
def test_heads(kind, auto, head):
    assert infer_roles(build(kind, auto)).paths("head") == head


def test_cross_attention_is_told_apart():
    roles = infer_roles(build("bart"))
    assert roles.paths("attn.cross") == tuple(f"decoder.layers.{i}.encoder_attn" for i in (0, 1))
    assert len(roles.paths("attn.self")) == 4


def test_plain_torch():
    roles = infer_roles(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 2, enable_nested_tensor=False)
    )
    assert roles.paths("attn") == ("layers.0.self_attn", "layers.1.self_attn")
    assert roles.paths("attn.o") == ("layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj")
    assert roles.paths("attn.q") == ("layers.0.self_attn.in_proj_weight[q]", "layers.1.self_attn.in_proj_weight[q]")
    assert roles.paths("ff.up") == ("layers.0.linear1", "layers.1.linear1")
    assert infer_roles(nn.TransformerEncoderLayer(12, 3, 20)).paths("ff.down") == ("linear2",)


@pytest.mark.parametrize("model", [nn.LSTM(3, 5), nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)), nn.Identity()])
def test_what_has_no_attention_has_no_units(model):
    roles = infer_roles(model)
    assert roles.units == roles.blocks == ()


def test_embeddings():
    assert infer_roles(build("t5")).paths("embed") == ("shared",)
    tagger = nn.ModuleDict(
        {"small": nn.Embedding(3, 5), "words": nn.Embedding(30, 5), "lstm": nn.LSTM(5, 7), "fc": nn.Linear(7, 2)}
    )
    assert infer_roles(tagger).paths("embed") == ("words",)
    assert infer_roles(tagger).paths("head") == ("fc",)


def test_embeddings_of_distances_inside_blocks_are_not_the_input_s():
    """They may be larger than the vocabulary (WavLM's are in its attention): `@embed` would adapt these instead."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.distances, self.layer = nn.Embedding(53, 7), nn.Linear(7, 7)

    model = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(2)), "tokens": nn.Embedding(31, 7)})
    assert list(dk.select(model, "@embed")) == ["tokens"]


def test_a_large_model_on_the_meta_device():
    config = tf.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = tf.AutoModel.from_config(config)
    assert len(infer_roles(model).paths("attn.q")) == 80


def test_the_table_of_roles_is_what_selectors_pick():
    table = dk.roles(build("t5"))
    assert repr(table).splitlines()[1:5] == [
        "  @block            4  {encoder,decoder}.block.{0-1}",
        "  @attn             6  encoder.block.{0-1}.layer.0.SelfAttention",
        "                       decoder.block.{0-1}.layer.0.SelfAttention",
        "                       decoder.block.{0-1}.layer.1.EncDecAttention",
    ]
    assert "none of @attn.kv, @attn.qkv" in repr(table).splitlines()[-1]
    assert {role: tuple(dk.select(build("t5"), role)) for role in table} == dict(table)


def test_the_table_has_rows_of_fused_projections_or_says_why_not():
    table = dk.roles(build("gpt2"))
    assert table["@attn.q"] == ("h.0.attn.c_attn[q]", "h.1.attn.c_attn[q]")

    class OpaqueAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)

        def forward(self, x, codebook):
            return self.proj(codebook[self.qkv(x).argmax(-1)])

    table = dk.roles(nn.Sequential(OpaqueAttention()))
    assert "@attn.qkv" in table
    assert "@attn.q" not in table
    assert "does not show which features are which; use '@attn.qkv'" in repr(table)


def test_cross_attention_beside_attention_that_says_self():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 2, 20), 1)
    assert list(dk.select(model, "@attn.self")) == ["layers.0.self_attn"]
    assert list(dk.select(model, "@attn.cross")) == ["layers.0.multihead_attn"]
