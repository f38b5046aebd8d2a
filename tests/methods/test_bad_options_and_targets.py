"""Options and targets that a method cannot take: what the error says, and that nothing is changed."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import Transformer, randomize, same, snapshot
from support.tiny_transformers import build


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
        (Transformer, dk.LoRA(at="norm_1"), r"layers\.0\.norm_1: LoRA serves Linear, Conv1D, .* found LayerNorm"),
        (Transformer, dk.LoRA(at="layers"), r"layers: LoRA serves .* found ModuleList"),
        (lambda: nn.ModuleDict({"q": Quantised()}), dk.LoRA(r=2, at="q"), r"q: the weight of this Quantised is torch.int8"),
        (lambda: nn.ModuleDict({"c": nn.ConvTranspose2d(4, 6, 1)}), dk.LoRA(r=2, at="c"), "c: LoRA serves Linear, .* found ConvTranspose2d; .*the parameter 'c.weight'"),
        (lambda: nn.ModuleDict({"r": nn.ReLU()}), dk.Adapter(at="r"), "r: cannot tell the size of what a ReLU gives"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.Adapter(at="out_proj"), "a.out_proj: the module around it reads"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.Adapter(at="in_proj_weight"), "a.in_proj_weight: this is a parameter, and adapter has nothing to patch there"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, bias=False)}), dk.BitFit(at="out_proj"), "a.out_proj: the module around it reads .* and bitfit has nothing to patch there"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.LoRA(r=2, at="in_proj_bias"), "a.in_proj_bias: LoRA on a parameter expects a matrix"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.LoRA(r=2, dropout=0.1, at="out_proj"), "a.out_proj: LoRA.dropout=0.1. drops inputs"),
        (lambda: build("gpt2", tf.AutoModelForCausalLM), dk.LoRA(r=2, at="lm_head"), "wte.weight: an update here alone"),
        (Transformer, dk.Prefix(at="mlp"), r"layers\.0\.mlp: no attention at or below this MLP"),
        (Transformer, dk.SoftPrompt(at="classifier"), "classifier: soft_prompt expects the embedding of the input ids"),
        (lambda: build("vit"), dk.SoftPrompt(), "ViTModel has no embedding of token ids"),
        (lambda: nn.Sequential(nn.Linear(2, 3)), dk.LoRA(r=1), "lora: no default position: nothing in Sequential answers @attn.q"),
        (nn.Identity, dk.LoRA(r=1), "lora: no default position: nothing in Identity"),
        (lambda: "model", dk.LoRA(), "expected a torch.nn.Module as the backbone, found str"),
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
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="q")))
    assert model["q"](torch.ones(1, 7)).abs().sum() > 0
    with pytest.raises(dk.TargetError, match=r"q\.weight: expected a floating-point weight"):
        delta.merge()


def test_an_error_that_tries_targets_out_draws_no_random_numbers():
    """Its hint builds delta modules: with the user's seed, all that is drawn later would be different."""
    model = nn.Sequential(nn.Linear(7, 5))
    state = torch.random.get_rng_state()
    with pytest.raises(dk.RoleError, match="name targets with at=, such as at='0'"):
        dk.attach(model, dk.LoRA(r=2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_method_and_no_methods(unchecked):
    with pytest.raises(dk.OptionError, match="no method given"):
        dk.attach(Transformer())
    with pytest.raises(dk.OptionError, match=r"expected methods such as LoRA\(r=8\), found <class"):
        dk.attach(Transformer(), dk.LoRA)
