"""Targets that are not a Linear: parameters, what is read and not called, rows of fused projections, convolutions.

Each is compared in float64 with the bare backbone whose weight was changed by hand to what the delta stands for.
"""

import copy

import pytest
import torch
import transformers as tf
from backbone_inputs import hidden, inputs
from backbones import COMMON, SIZES, build
from models import randomize, same, snapshot
from torch import nn

import deltakit as dk


def changed(model, delta):
    """A copy of the bare backbone with the delta's updates added to its weights by hand."""
    other = copy.deepcopy(model)
    dk.deltas(other)[0].detach()
    for path, modules in delta.modules.items():
        for module in modules:
            owner = other.get_submodule(path.removesuffix(module.part).removesuffix("."))
            for name, update in module.weight_update(owner).items():
                with torch.no_grad():
                    owner._parameters[name].add_(update)
    return other


def check(model, call, method, targets):
    """Identity, the same output and gradients as changed weights, key names kept, exact detach."""
    before, bare = snapshot(model), call(model)
    keys = set(model.state_dict())
    delta = dk.attach(model, method)
    assert sorted(delta.modules) == sorted(targets)
    assert torch.equal(call(model), bare)
    assert keys <= set(model.state_dict())
    randomize(delta)
    torch.testing.assert_close(call(model), call(changed(model, delta)))
    assert not torch.allclose(call(model), bare)
    call(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in delta.parameters())
    with pytest.raises((TypeError, ValueError)):
        model("no tensor", "at all", None, None)
    delta.detach()
    model.zero_grad()
    same(before, snapshot(model))
    assert torch.equal(call(model), bare)


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)

    def forward(self, x, other):
        return self.attention(x, other[0], other[1])[0]


@pytest.mark.parametrize(
    "method", [dk.LoRA(r=2, at="@attn.{q,k,v,o}"), dk.BitFit(at="@attn.{q,k,v,o}")], ids=lambda m: m.name
)
@pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 5}], ids=["fused", "unequal"])
@pytest.mark.parametrize("training", [False, True])
def test_torch_attention(options, training, method):
    model = Attends(**options).double().train(training)
    x = torch.randn(2, 3, 12).double()
    other = [torch.randn(2, 4, options.get(name, 12)).double() for name in ("kdim", "vdim")]
    names = [f"{c}_proj_weight" for c in "qkv"] if options else [f"in_proj_weight[{c}]" for c in "qkv"]
    check(model, lambda m: m(x, other), method, [f"attention.{name}" for name in (*names, "out_proj")])


def test_the_fast_path_of_torch_does_not_pass_a_delta_by():
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 12)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at=["@attn.{q,o}", "@ff.{up,down}"])))
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x))
    torch.testing.assert_close(fast, changed(model, delta)(x))
    assert [
        m.weight_read is not None
        for m in (delta.modules["layers.0.linear1"][0], delta.modules["layers.0.self_attn.out_proj"][0])
    ] == [False, True]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_that_are_parameters(kind):
    if kind == "mixtral":
        model = build(kind).double()
        # The grouped kernel has no float64.
        model.set_experts_implementation("eager")
    else:
        config = tf.GptOssConfig(
            **SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2, **COMMON
        )
        model = tf.AutoModel.from_config(config, attn_implementation="eager").eval().double()
        model.set_experts_implementation("eager")
    batch = inputs("llama", model)
    experts = [f"layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]
    check(model, lambda m: hidden(m(**batch)), dk.LoRA(r=2, at="@ff.{gate_up,down}"), experts)
    delta = dk.attach(model, dk.LoRA(r=2, at="experts.down_proj"))
    shape = model.layers[0].mlp.experts.down_proj.shape
    flipped = kind == "gpt_oss"
    assert delta.modules[experts[1]][0].A.shape == (3, 2, shape[1] if flipped else shape[2])


def test_experts_merge_and_come_out_again_exactly():
    model = build("mixtral")
    batch = inputs("mixtral", model)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="@ff.down")))
    attached = hidden(model(**batch))
    before = snapshot(model)
    delta.merge()
    torch.testing.assert_close(hidden(model(**batch)), attached, rtol=1e-4, atol=1e-5)
    delta.unmerge()
    same(before, snapshot(model))
    assert "weight patch" in repr(delta)


def test_what_a_class_reads_itself_is_adapted_by_weight():
    config = tf.MambaConfig(hidden_size=24, num_hidden_layers=2, state_size=4, **COMMON)
    model = tf.AutoModel.from_config(config).eval().double()
    ids = torch.randint(3, 97, (2, 7))
    targets = [f"layers.{i}.mixer.{name}" for i in (0, 1) for name in ("out_proj", "x_proj", "conv1d", "in_proj")]
    method = dk.LoRA(r=2, at="{out_proj,x_proj,conv1d,in_proj}")
    check(model, lambda m: m(ids).last_hidden_state, method, targets)
    plan = repr(dk.plan(model, method))
    assert "mixer.{out_proj,x_proj,conv1d}  weight patch" in plan.replace(
        "conv1d,x_proj,out_proj", "out_proj,x_proj,conv1d"
    )
    assert "layers.{0-1}.mixer.in_proj\n" in plan


CONVOLUTIONS = [
    nn.Conv1d(6, 9, 3),
    nn.Conv1d(6, 9, 3, groups=3, stride=2, padding=2),
    nn.Conv1d(8, 8, 4, groups=8, padding=3),
    nn.Conv2d(6, 10, (3, 2), groups=2, stride=(2, 1), dilation=(1, 2), padding="valid"),
    nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(6, 10, 3, padding="same", padding_mode="reflect", groups=2),
    nn.Conv3d(4, 6, 2, groups=2, padding=1),
]


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_convolutions(convolution):
    model = nn.Sequential(copy.deepcopy(convolution)).double()
    x = torch.randn(2, convolution.in_channels, *[7, 8, 6][: len(convolution.kernel_size)]).double()
    check(model, lambda m: m(x), dk.LoRA(r=3, at="0"), ["0"])
    check(model, lambda m: m(x), dk.BitFit(at="0"), ["0"])


def test_an_embedding_with_a_forward_of_its_own_is_adapted_by_weight():
    model = build("gemma3_text").double()
    ids = torch.randint(3, 97, (2, 7))
    check(model, lambda m: m(input_ids=ids).last_hidden_state, dk.LoRA(r=2, at="embed_tokens"), ["embed_tokens"])


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
        update = (lora.scale * lora.B @ lora.A).view(groups, size, -1)
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


def test_tied_weights_are_one_delta_or_an_explicit_choice():
    model = build("gpt2", tf.AutoModelForCausalLM).double()
    ids = torch.randint(3, 97, (2, 7))
    with pytest.raises(
        dk.TargetError, match=r"wte: its weight is tied to lm_head\.weight: .* name the parameter '.*wte\.weight'"
    ):
        dk.attach(model, dk.LoRA(r=2, at="wte"))
    check(model, lambda m: m(input_ids=ids).logits, dk.LoRA(r=2, at="wte.weight"), ["transformer.wte.weight"])
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="lm_head.weight")))
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(delta.merge().backbone(input_ids=ids).logits, logits)
    assert model.lm_head.weight is model.transformer.wte.weight
    delta.detach()
    alone = randomize(dk.attach(model, dk.LoRA(r=2, at="lm_head", untie=True)))
    assert list(alone.modules) == ["lm_head"]


def test_recomputed_blocks():
    model = build("mixtral", tf.AutoModelForCausalLM).train()
    batch = inputs("mixtral", model)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at=["@ff.down", "@attn.q"])))

    def gradients():
        model.zero_grad()
        model(**batch).logits.square().sum().backward()
        return [p.grad.clone() for p in delta.parameters()]

    plain = gradients()
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        for a, b in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(a, b)


def test_two_deltas_in_one_weight_add_up():
    model = build("mixtral")
    batch = inputs("mixtral", model)
    bare = hidden(model(**batch))
    one = randomize(dk.attach(model, dk.LoRA(r=2, at="experts.down_proj")))
    two = randomize(dk.attach(model, dk.LoRA(r=3, at="experts.down_proj"), name="two"))
    together = hidden(model(**batch))
    other = copy.deepcopy(model)
    first, second = dk.deltas(other)
    first.merge()
    second.active = False
    assert not torch.allclose(hidden(other(**batch)), together)
    second.active = True
    torch.testing.assert_close(hidden(other(**batch)), together, rtol=1e-4, atol=1e-5)
    one.active = two.active = False
    assert torch.equal(hidden(model(**batch)), bare)


def test_files_hold_rows_and_parameters(tmp_path):
    for kind, at in (("bloom", "@attn.{q,v}"), ("mixtral", ["@ff.down", "@attn.v"])):
        model = build(kind)
        batch = inputs(kind, model)
        delta = randomize(dk.attach(model, dk.LoRA(r=2, at=at)))
        adapted = hidden(model(**batch))
        delta.save(tmp_path / kind)
        delta.detach()
        again = dk.load(tmp_path / kind, build(kind))
        assert torch.equal(hidden(again.backbone(**batch)), adapted)
        assert sorted(again.state_dict()) == sorted(delta.state_dict())
        with pytest.raises(dk.BackboneMismatch):
            dk.load(tmp_path / kind, build("bert"))


class ChannelsFirstNorm(nn.LayerNorm):
    """Norms of convolutional models permute for torch's layer norm, and back (SqueezeBERT, ConvNeXt)."""

    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


# As many positions as features: an axis that is mistaken shows in the values only.
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda: nn.BatchNorm1d(6), (3, 6, 6)),
        (lambda: nn.BatchNorm2d(5), (3, 5, 5, 5)),
        (lambda: nn.GroupNorm(2, 6), (3, 6, 6)),
        (lambda: nn.InstanceNorm2d(6, affine=True), (3, 6, 6, 6)),
        (lambda: ChannelsFirstNorm(6), (3, 6, 6)),
        (lambda: nn.LayerNorm(6), (6, 6, 6)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else type(value()).__name__,
)
def test_a_bias_on_norms_stands_on_their_features(norm, shape):
    x = torch.randn(shape).double()
    check(nn.Sequential(norm()).double().eval(), lambda m: m(x), dk.BitFit(at="0"), ["0"])


def test_an_adapter_behind_a_convolution_works_on_its_channels():
    model = nn.Sequential(nn.Conv2d(3, 5, 1)).double()
    delta = randomize(dk.attach(model, dk.Adapter(size=2, at="0", activation="tanh")))
    (adapter,) = delta.modules["0"]
    x = torch.randn(2, 3, 5, 7).double()
    y = nn.functional.conv2d(x, model[0].weight, model[0].bias)
    h = torch.tanh(torch.einsum("bchw,rc->brhw", y, adapter.down.weight) + adapter.down.bias[:, None, None])
    update = torch.einsum("brhw,cr->bchw", h, adapter.up.weight) + adapter.up.bias[:, None, None]
    torch.testing.assert_close(model(x), y + update)


def test_an_adapter_on_other_features_than_it_was_told_is_an_error():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x[..., :4]

    model = nn.Sequential(Block())
    model[0].weight = nn.Parameter(torch.ones(6))
    dk.attach(model, dk.Adapter(size=2, at="0"))
    with pytest.raises(dk.TargetError, match=r"has shape \(2, 4\): expected 6 features at dimension -?1, found 4"):
        model(torch.ones(2, 6))


def test_a_layer_whose_weight_is_only_read_is_passed_over_by_what_needs_it_called():
    class ReaderAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))
            self.out_proj = nn.Linear(6, 6)

        def forward(self, x):
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            h = nn.functional.scaled_dot_product_attention(q, k, v)
            return nn.functional.linear(h, self.out_proj.weight, self.out_proj.bias)

    model = nn.Sequential(ReaderAttention())
    delta = dk.attach(model, dk.Adapter(size=2))
    assert list(delta.modules) == ["0"]
    randomize(delta)
    model(torch.randn(2, 3, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())


def test_a_tied_weight_is_updated_wherever_a_part_is_called_alone():
    model = build("bart", tf.AutoModelForSeq2SeqLM)
    ids = torch.randint(5, 30, (2, 6))
    delta = randomize(dk.attach(model, dk.LoRA(r=3, at="model.shared.weight")))
    whole = model(input_ids=ids, decoder_input_ids=ids).encoder_last_hidden_state
    assert torch.equal(model.get_encoder()(ids).last_hidden_state, whole)
    delta.merge()
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).encoder_last_hidden_state, whole)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.layers[1].weight = self.layers[0].weight

    def forward(self, x, again):
        for layer in self.layers:
            x = torch.tanh(
                torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=again == "reentrant") if again else layer(x)
            )
        return x


@pytest.mark.parametrize("again", ["reentrant", "not reentrant"])
def test_a_tied_weight_under_recomputation(again):
    model, x = Tied().double(), torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="layers.0.weight")))

    def gradients(how):
        return torch.autograd.grad(model(x, how).square().sum(), [x, *delta.parameters()]) if not how else backward(how)

    def backward(how):
        x.grad = None
        for parameter in delta.parameters():
            parameter.grad = None
        model(x, how).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in delta.parameters())]

    torch.testing.assert_close(backward(again), list(gradients("")))


class Tree(nn.Module):
    """A module that calls itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x, depth=2):
        return torch.tanh((self(x, depth - 1) + self(x, 0) if depth else x) @ self.weight.T)


def test_forwards_by_weight_nest():
    model, x = Tree(), torch.randn(2, 6)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="weight")))
    attached = model(x)
    delta.merge()
    torch.testing.assert_close(attached, model(x))
    delta.unmerge()
    assert not any(name.startswith("_deltakit") for name in vars(model))


def test_forwards_by_weight_in_threads():
    from concurrent.futures import ThreadPoolExecutor

    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True), 2).eval()
    randomize(dk.attach(model, dk.LoRA(r=2)))
    x = torch.randn(1, 5, 24)

    def run(_):
        with torch.no_grad():
            return model(x)

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(output, expected) for output in pool.map(run, range(200)))


class Causal(nn.Conv1d):
    """A convolution that pads itself."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))


def test_a_convolution_with_a_forward_of_its_own_is_adapted_by_weight():
    x = torch.randn(2, 6, 3).double()
    check(nn.Sequential(Causal(6, 5, 3)).double(), lambda m: m(x), dk.LoRA(r=2, at="0"), ["0"])


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


def test_the_padding_of_an_embedding_is_not_trained():
    model = nn.Sequential(nn.Embedding(7, 6, padding_idx=2))
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="0")))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    (lora,) = delta.modules["0"]
    assert not lora.A.grad[:, 2].any()
    assert lora.A.grad[:, 1].all()


def test_torch_s_attention_as_the_backbone():
    model = nn.MultiheadAttention(12, 3, batch_first=True)
    delta = randomize(dk.attach(model, dk.LoRA(r=2)))
    assert sorted(delta.modules) == ["in_proj_weight[q]", "in_proj_weight[v]"]
    model(*[torch.randn(2, 5, 12)] * 3)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())


@pytest.mark.parametrize(
    "method", [dk.LoRA(r=2), dk.BitFit(), dk.Adapter(size=2), dk.Prefix(tokens=2)], ids=lambda m: m.name
)
def test_padded_batches_in_torch_s_encoder(method):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, dropout=0), 2).eval()
    x, pad = torch.randn(2, 5, 24), torch.tensor([[0, 0, 0, 1, 1], [0] * 5]).bool()
    delta = randomize(dk.attach(model, method), 0.05)
    with torch.no_grad():
        padded = model(x, src_key_padding_mask=pad)
        torch.testing.assert_close(padded[:1, :3], model(x[:1, :3]))
    assert model(x, src_key_padding_mask=pad).requires_grad
    delta.detach()
    assert model.use_nested_tensor is True


def test_merging_into_what_is_no_parameter_is_an_error():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)))
    delta = dk.attach(model, dk.LoRA(r=2, at="0"))
    with pytest.raises(dk.TargetError, match=r"0\.weight: expected a parameter to merge into.*weight_norm"):
        delta.merge()
