"""Queries, keys and values computed by one layer: which of its rows are which, and deltas on some of them."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import randomize, same, snapshot
from support.tiny_transformers import COMMON, SIZES, build

# By hand from the forwards: groups, and the features of each group in order.
LAYOUTS = {
    "gpt2": (tf.GPT2Config(n_embd=24, n_layer=1, n_head=4, **COMMON), 1, [("q", 24), ("k", 24), ("v", 24)]),
    "gpt_neox": (tf.GPTNeoXConfig(**SIZES, **COMMON), 4, [("q", 6), ("k", 6), ("v", 6)]),
    "bloom": (tf.BloomConfig(hidden_size=24, n_layer=1, n_head=4, **COMMON), 4, [("q", 6), ("k", 6), ("v", 6)]),
    "falcon": (
        tf.FalconConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, **COMMON),
        1,
        [("q", 24), ("k", 6), ("v", 6)],
    ),
    "falcon-grouped": (
        tf.FalconConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            new_decoder_architecture=True,
            num_kv_heads=2,
            **COMMON,
        ),
        2,
        [("q", 12), ("k", 6), ("v", 6)],
    ),
    "phi3": (tf.Phi3Config(**SIZES, num_key_value_heads=2, **COMMON), 1, [("q", 24), ("k", 12), ("v", 12)]),
    "codegen": (
        tf.CodeGenConfig(n_embd=32, n_layer=1, n_head=8, rotary_dim=2, **COMMON),
        4,
        [("q", 8), ("v", 8), ("k", 8)],
    ),
    "gpt_bigcode": (tf.GPTBigCodeConfig(n_embd=24, n_layer=1, n_head=4, **COMMON), 1, [("q", 24), ("k", 6), ("v", 6)]),
    "mpt": (tf.MptConfig(d_model=24, n_layers=1, n_heads=4, **COMMON), 1, [("q", 24), ("k", 24), ("v", 24)]),
    "modernbert": (
        tf.ModernBertConfig(**SIZES, **COMMON, sep_token_id=3, cls_token_id=4),
        1,
        [("q", 24), ("k", 24), ("v", 24)],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("letter", "qkv")
def test_rows_of_fused_projections(name, letter):
    config, groups, order = LAYOUTS[name]
    model = tf.AutoModel.from_config(config).eval().double()
    ids = torch.randint(5, 97, (2, 6))
    bare = model(input_ids=ids).last_hidden_state
    delta = dk.attach(model, dk.LoRA(r=2, at=f"@attn.{letter}"))
    assert torch.equal(model(input_ids=ids).last_hidden_state, bare)
    randomize(delta)
    adapted = model(input_ids=ids).last_hidden_state
    updates = {path: modules[0] for path, modules in delta.modules.items()}
    delta.detach()
    for path, lora in updates.items():
        module = model.get_submodule(path.removesuffix(f"[{letter}]"))
        transposed = type(module).__name__ == "Conv1D"
        weight = module.weight.T if transposed else module.weight
        blocks = weight.detach().clone().view(groups, -1, weight.shape[1])
        start = sum(size for part, size in order[: [part for part, _ in order].index(letter)])
        size = dict(order)[letter]
        update = (lora.scaling * lora.B @ lora.A).view(groups, size, -1)
        blocks[:, start : start + size] += update
        module.weight.data = blocks.view_as(weight).T if transposed else blocks.view_as(weight)
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, adapted)


@pytest.mark.parametrize(
    "method",
    [dk.Adapter(size=2, at="@attn.v"), dk.BitFit(at="@attn.v"), dk.LoRA(r=2, at="@attn.v")],
    ids=lambda m: m.name,
)
def test_every_method_keeps_to_its_rows(method):
    model = build("bloom").double()
    fused = model.h[0].self_attention.query_key_value
    x = torch.randn(3, 24).double()
    bare = fused(x)
    randomize(dk.attach(model, method))
    moved = (fused(x) - bare).view(3, 4, 3, 6).abs().amax((0, 1, 3))
    assert moved[0] == moved[1] == 0
    assert moved[2] > 0


def test_a_layout_that_cannot_be_told_is_an_error():
    class OpaqueAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x, secret):
            return self.proj(secret.split(self.qkv(x)))

    model = nn.ModuleDict({"attn": OpaqueAttention()})
    with pytest.raises(
        dk.RoleError, match=r"'@attn\.q': attn\.qkv of ModuleDict computes q, k, v in one projection.*use '@attn\.qkv'"
    ):
        dk.select(model, "@attn.q")
    assert list(dk.attach(model, dk.LoRA(r=2)).modules) == ["attn.qkv"]


def test_measuring_touches_nothing():
    model = build("gpt2")
    before, seed = snapshot(model), torch.random.get_rng_state()
    dk.select(model, "@attn.q")
    same(before, snapshot(model))
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_measuring_calls_no_hooks_and_drops_nothing():
    """The user's hooks are for the user's forwards, and dropout would hide what depends on what."""
    model, called = build("gpt2", attn_pdrop=0.9, resid_pdrop=0.9).train(), []
    for block in model.h:
        block.attn.register_forward_pre_hook(lambda module, args: called.append(module))
        block.attn.register_forward_hook(lambda module, args, output: called.append(module))
        block.attn.c_proj.register_forward_hook(lambda module, args, output: called.append(module))
    assert sorted(dk.select(model, "@attn.{q,k,v}")) == [f"h.{i}.attn.c_attn[{c}]" for i in (0, 1) for c in "kqv"]
    assert not called


def test_layers_of_one_class_that_differ_are_measured_apart():
    class Attention(nn.Module):
        def __init__(self, order):
            super().__init__()
            self.order = order
            self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x):
            parts = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
            named = dict(zip(self.order, parts, strict=True))
            h = nn.functional.scaled_dot_product_attention(named["q"], named["k"], named["v"])
            return self.proj(h.transpose(1, 2).flatten(2))

    model = nn.Sequential(Attention("qkv"), Attention("kvq"))
    delta = dk.attach(model, dk.LoRA(r=2, at="@attn.q"))
    assert [modules[0].feature_slice.start for modules in delta.modules.values()] == [0, 24]
