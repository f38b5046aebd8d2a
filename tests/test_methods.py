"""LoRA, Adapter and BitFit against their papers' formulas in float64, against PEFT, and against their bad options."""

import copy
import math

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from backbones import build
from models import Kinds, Transformer, ids, randomize, same, snapshot
from torch import nn

import deltakit as dk

KINDS = ("embedding", "conv", "linear", "conv1d")


def kinds():
    torch.manual_seed(2)
    return Kinds().double().eval(), torch.randint(0, 13, (3, 5))


def attached(model, method, **options):
    delta = dk.attach(model, method, **options)
    randomize(delta)
    return delta


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_equals_peft_on_the_same_weights(rslora):
    model, x = kinds()
    twin = copy.deepcopy(model)
    delta = attached(model, dk.LoRA(r=3, alpha=5, rslora=rslora, at=KINDS))
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=list(KINDS), fan_in_fan_out=False)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        other = peft.get_peft_model(twin, config).eval().double()
    state = {name: value.detach() for name, value in delta.state_dict().items()}
    layers = other.base_model.model
    with torch.no_grad():
        for name in KINDS:
            layer, a, b = getattr(layers, name), state[f"{name}.lora.A"], state[f"{name}.lora.B"]
            if name == "embedding":
                layer.lora_embedding_A["default"].copy_(a)
                layer.lora_embedding_B["default"].copy_(b)
            else:
                layer.lora_A["default"].weight.copy_(a.view_as(layer.lora_A["default"].weight))
                layer.lora_B["default"].weight.copy_(b.view_as(layer.lora_B["default"].weight))
    assert not torch.allclose(model(x), delta.detach().backbone(x))
    torch.testing.assert_close(delta.attach().backbone(x), other(x), rtol=1e-12, atol=1e-12)


def test_lora_is_its_formula():
    layer = nn.Linear(7, 11).double()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    plain = layer(x)
    delta = attached(nn.ModuleDict({"layer": layer}), dk.LoRA(r=3, alpha=5, at="layer"))
    a, b = delta.state_dict().values()
    assert (a.shape, b.shape) == ((3, 7), (11, 3))
    torch.testing.assert_close(layer(x), plain + 5 / 3 * x @ a.T @ b.T, rtol=1e-12, atol=1e-12)


def test_lora_starts_as_the_authors_code_does():
    layers = nn.ModuleDict({"linear": nn.Linear(700, 300), "embedding": nn.Embedding(500, 300)})
    state = dk.attach(layers, dk.LoRA(r=8, at="*")).state_dict()
    assert not state["linear.lora.B"].any()
    assert not state["embedding.lora.A"].any()
    bound = math.sqrt(1 / 700)
    assert state["linear.lora.A"].abs().max() == pytest.approx(bound, rel=0.01)
    assert state["linear.lora.A"].std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert state["embedding.lora.B"].std() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_merged_and_hooked_agree(dtype, tolerance):
    model, x = kinds()
    model = model.to(dtype)
    before = snapshot(model)
    delta = attached(model, dk.LoRA(r=3, at=KINDS))
    hooked = model(x)
    assert (delta.merge().backbone(x) - hooked).abs().max() <= tolerance * hooked.abs().max()
    delta.detach()
    same(before, snapshot(model))


def test_merging_refuses_what_it_would_harm():
    model = build("gpt2", tf.AutoModelForCausalLM)
    delta = attached(model, dk.LoRA(r=3, at="wte", untie=True))
    with pytest.raises(dk.StateError, match=r"wte\.weight is tied to lm_head\.weight: merging would change both"):
        delta.merge()
    delta.detach()
    one = attached(model, dk.LoRA(r=3, at="@attn.qkv"))
    two = attached(model, dk.LoRA(r=2, at="@attn.qkv"), name="two")
    one.merge()
    with pytest.raises(dk.StateError, match="delta 'delta' is merged into it; unmerge 'delta' first"):
        two.merge()
    two.active = False
    with pytest.raises(
        dk.StateError, match="merging expects it attached, active and not merged; it is attached, not active"
    ):
        two.merge()
    with pytest.raises(dk.StateError, match="'two' is not merged"):
        two.unmerge()


def test_dropout_is_on_the_update_and_in_training_only():
    model = Transformer().eval()
    delta = attached(model, dk.LoRA(r=3, dropout=0.5))
    still = model(ids())
    assert torch.equal(model(ids()), still)
    model.train()
    assert not torch.equal(model(ids()), model(ids()))
    assert "dropout=0.5" in repr(delta)


@pytest.mark.parametrize(
    ("activation", "f"),
    [
        ("gelu", F.gelu),
        ("relu", torch.relu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("tanh", torch.tanh),
    ],
)
def test_adapter_is_its_formula(activation, f):
    layer = nn.Linear(7, 11).double()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    y = layer(x)
    attached(nn.ModuleDict({"layer": layer}), dk.Adapter(size=3, activation=activation, at="layer"))
    adapter = layer.delta_adapter
    wd, bd, wu, bu = (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias)
    assert (wd.shape, wu.shape) == ((3, 11), (11, 3))
    torch.testing.assert_close(layer(x), y + f(y @ wd.T + bd) @ wu.T + bu, rtol=1e-12, atol=1e-12)


def test_adapter_sizes_and_norms():
    model = Transformer()
    assert dk.attach(model, dk.Adapter(reduction=7)).modules["layers.0.mlp.down_proj"][0].down.out_features == 2
    delta = dk.attach(Transformer(), dk.Adapter(size=3, norms=True))
    trained = [name for name, p in delta.backbone.named_parameters() if p.requires_grad and "adapter" not in name]
    assert trained == [name for name, _ in delta.backbone.named_parameters() if "norm" in name]


def test_adapter_after_experts_without_projections():
    model = build("mixtral")
    delta = dk.attach(model, dk.Adapter(size=3))
    assert list(delta.modules) == [
        *(f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.o_proj", "mlp")),
    ] or set(delta.modules) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.o_proj", "mlp")}


def test_bitfit_is_an_added_bias_with_or_without_one():
    model = build("llama").double()
    delta = attached(model, dk.BitFit())
    assert {path.rpartition(".")[2] for path in delta.modules} >= {"q_proj", "down_proj", "norm"}
    norm = model.norm
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    bias = norm.delta_bitfit.bias
    torch.testing.assert_close(norm(x) - bias, delta.detach().backbone.norm(x), rtol=1e-12, atol=1e-12)


def test_bitfit_on_a_convolution_is_one_value_a_channel():
    conv = nn.Conv2d(3, 7, 2).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    plain = conv(x)
    attached(nn.ModuleDict({"conv": conv}), dk.BitFit(at="conv"))
    torch.testing.assert_close(conv(x), plain + conv.delta_bitfit.bias[:, None, None], rtol=1e-12, atol=1e-12)


def test_bitfit_merges_into_the_bias_that_is_there():
    model = Transformer().eval()
    delta = attached(model, dk.BitFit(at="@attn.q"))
    output = model(ids())
    torch.testing.assert_close(delta.merge().backbone(ids()), output)
    delta.detach()
    bare = attached(model, dk.BitFit(at="@attn.k"))
    with pytest.raises(
        dk.TargetError, match=r"layers\.0\.self_attn\.k_proj: a Linear without a bias has nothing to merge"
    ):
        bare.merge()


def test_bitfit_smaller_variant():
    delta = dk.attach(Transformer(), dk.BitFit(subset="query_mlp"))
    assert {path.rpartition(".")[2] for path in delta.modules} == {"q_proj", "up_proj"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.LoRA(r=0), r"LoRA\(r=0\): the rank must be an integer of at least 1"),
        (lambda: dk.LoRA(r=2.5), r"LoRA\(r=2.5\)"),
        (lambda: dk.LoRA(alpha=-1), r"LoRA\(alpha=-1\): must be a finite number, not negative"),
        (lambda: dk.LoRA(alpha=float("nan")), r"LoRA\(alpha=nan\)"),
        (lambda: dk.LoRA(dropout=1.0), r"LoRA\(dropout=1.0\): a probability in \[0, 1\)"),
        (lambda: dk.LoRA(dropout=-0.1), r"LoRA\(dropout=-0.1\)"),
        (lambda: dk.LoRA(of=3), r"of=3: expected a module class or its name"),
        (lambda: dk.Adapter(size=0), r"Adapter\(size=0\): an integer of at least 1"),
        (lambda: dk.Adapter(size=2, reduction=2), "give one of them, not both"),
        (lambda: dk.Adapter(activation="gelo"), r"Adapter\(activation='gelo'\): one of gelu, "),
        (lambda: dk.BitFit(subset="half"), r"BitFit\(subset='half'\): one of all, query_mlp"),
        (lambda: dk.BitFit(subset="query_mlp", at="x"), "both say where"),
        (lambda: dk.Prefix(tokens=0), r"Prefix\(tokens=0\)"),
        (lambda: dk.SoftPrompt(tokens=-1), r"SoftPrompt\(tokens=-1\)"),
        (lambda: dk.SoftPrompt(init="text"), r"SoftPrompt\(init='text'\)"),
        (lambda: dk.SoftPrompt(where="end"), r"SoftPrompt\(where='end'\)"),
        (lambda: dk.SoftPrompt(init_ids=[]), r"SoftPrompt\(init_ids=\[\]\)"),
    ],
)
def test_bad_options(unchecked, make, message):
    with pytest.raises(dk.OptionError, match=message):
        make()


class Quantised(nn.Module):
    in_features, out_features = 7, 5

    def __init__(self, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 7, dtype=torch.int8), requires_grad=False)
        vars(self).update(attributes)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (Transformer, dk.LoRA(r=21), r"q_proj: rank 21 is above the layer's size 20 to 20; at most 20"),
        (Transformer, dk.LoRA(at="norm_1"), r"layers\.0\.norm_1: lora serves Linear, Conv1D, .* found LayerNorm"),
        (Transformer, dk.LoRA(at="layers"), r"layers: lora serves .* found ModuleList"),
        (lambda: nn.ModuleDict({"q": Quantised()}), dk.LoRA(r=2, at="q"), r"q: the weight of this Quantised is torch.int8"),
        (lambda: nn.ModuleDict({"c": nn.ConvTranspose2d(4, 6, 1)}), dk.LoRA(r=2, at="c"), "c: lora serves Linear, .* found ConvTranspose2d; .*the parameter 'c.weight'"),
        (lambda: nn.ModuleDict({"r": nn.ReLU()}), dk.Adapter(at="r"), "r: cannot tell the size of what a ReLU gives"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.Adapter(at="out_proj"), "a.out_proj: what is around it reads"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.Adapter(at="in_proj_weight"), "a.in_proj_weight: this is a parameter, and adapter has no form"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, bias=False)}), dk.BitFit(at="out_proj"), "a.out_proj: its NonDynam.* has no bias of its own"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.LoRA(r=2, at="in_proj_bias"), "a.in_proj_bias: lora on a parameter expects a matrix"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.LoRA(r=2, dropout=0.1, at="out_proj"), "a.out_proj: LoRA.dropout=0.1. drops inputs"),
        (lambda: build("gpt2", tf.AutoModelForCausalLM), dk.LoRA(r=2, at="lm_head"), "wte.weight: an update here alone"),
        (Transformer, dk.Prefix(at="mlp"), r"layers\.0\.mlp: no attention at or below this MLP"),
        (Transformer, dk.SoftPrompt(at="classifier"), "classifier: soft_prompt expects the embedding of the input ids"),
        (lambda: build("vit"), dk.SoftPrompt(), "ViTModel: it has no embedding of token ids"),
        (lambda: nn.Sequential(nn.Linear(2, 3)), dk.LoRA(r=1), "lora: no default position: Sequential has no @attn.q, @attn.v; select layers by name with at="),
        (nn.Identity, dk.LoRA(r=1), "lora: no default position: Identity has no @attn.q"),
        (lambda: "model", dk.LoRA(), "backbone: expected a torch.nn.Module, found str"),
    ],
)  # fmt: skip
def test_bad_targets_change_nothing(unchecked, make, method, message):
    model = make()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(model, method)
    if before is not None:
        same(before, snapshot(model))


def test_a_quantised_weight_that_says_its_dtype_is_served():
    model = nn.ModuleDict({"q": Quantised(compute_dtype=torch.float32)})
    delta = attached(model, dk.LoRA(r=2, at="q"))
    assert model["q"](torch.ones(1, 7)).abs().sum() > 0
    with pytest.raises(dk.TargetError, match=r"q\.weight: expected a floating-point weight"):
        delta.merge()


def test_no_method_and_no_methods(unchecked):
    with pytest.raises(dk.OptionError, match="no method given"):
        dk.attach(Transformer())
    with pytest.raises(dk.OptionError, match=r"expected methods such as LoRA\(r=8\), found <class"):
        dk.attach(Transformer(), dk.LoRA)
