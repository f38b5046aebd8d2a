"""Options and targets that a method cannot take: what the error says, and that nothing is changed."""

import re

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
        (lambda: dk.LoRA(r=0), r"LoRA\(r=0\): expected a rank of at least 1"),
        (lambda: dk.LoRA(r=2.5), r"LoRA\(r=2.5\)"),
        (lambda: dk.LoRA(alpha=-1), r"LoRA\(alpha=-1\): expected a finite number of at least 0"),
        (lambda: dk.LoRA(alpha=float("nan")), r"LoRA\(alpha=nan\)"),
        (lambda: dk.LoRA(dropout=1.0), r"LoRA\(dropout=1.0\): expected a probability in \[0, 1\)"),
        (lambda: dk.LoRA(dropout=-0.1), r"LoRA\(dropout=-0.1\)"),
        (lambda: dk.LoRA(alpha="x"), r"LoRA\(alpha='x'\)"),
        (lambda: dk.LoRA(dropout="x"), r"LoRA\(dropout='x'\)"),
        (lambda: dk.LoRA(of=3), r"LoRA\(of=3\): expected a class of Module, a text, "),
        (lambda: dk.Adapter(size=0), r"Adapter\(size=0\): expected at least 1"),
        (lambda: dk.Adapter(size=2, reduction=2), "omit one of the two"),
        (lambda: dk.Adapter(activation="gelo"), r"Adapter\(activation='gelo'\): expected one of gelu, "),
        (lambda: dk.BitFit(subset="half"), r"BitFit\(subset='half'\): expected one of all, query_mlp"),
        (lambda: dk.BitFit(subset="query_mlp", at="x"), "both choose the targets"),
        (lambda: dk.Prefix(tokens=0), r"Prefix\(tokens=0\)"),
        (lambda: dk.Prefix(relative_positions="none"), r"positions='none'\): expected 'all_blocks' or 'first_block'"),
        (lambda: dk.SoftPrompt(tokens=-1), r"SoftPrompt\(tokens=-1\)"),
        (lambda: dk.SoftPrompt(init="text"), r"SoftPrompt\(init='text'\)"),
        (lambda: dk.SoftPrompt(where="end"), r"SoftPrompt\(where='end'\)"),
        (lambda: dk.SoftPrompt(init_ids=[]), r"SoftPrompt\(init_ids=\[\]\)"),
    ],
)
def test_bad_options(unchecked, make, message):
    with pytest.raises(dk.OptionError, match=message):
        make()


class Quantized(nn.Module):
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
        (Transformer, dk.LoRA(r=21), r"q_proj: rank 21 is above the layer's size 20 to 20; use LoRA\(r=20\) or less"),
        (Transformer, dk.LoRA(at="norm_1"), r"layers\.0\.norm_1: LoRA works on Linear, Conv1D, .* found LayerNorm"),
        (Transformer, dk.LoRA(r=21, at="mlp"), r"layers\.0\.mlp\.up_proj: rank 21 is above the layer's size 20 to 28; .* leave it out with exclude="),
        (lambda: nn.ModuleDict({"q": Quantized()}), dk.LoRA(r=2, at="q"), r"q: the weight of this Quantized is torch.int8"),
        (lambda: nn.ModuleDict({"c": nn.ConvTranspose2d(4, 6, 1)}), dk.LoRA(r=2, at="c"), "c: LoRA works on Linear, .* found ConvTranspose2d; .*the parameter 'c.weight'"),
        (lambda: nn.ModuleDict({"r": nn.ReLU()}), dk.Adapter(at="r"), "r: the structure does not show the output size of this ReLU"),
        (lambda: nn.ModuleDict({"s": nn.Sequential(nn.Linear(4, 5), nn.ReLU())}), dk.Adapter(at="s"), "s: Adapter cannot be on an nn.Sequential, .*; select a module in it, such as s.0"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.Adapter(at="out_proj"), "a.out_proj: the module around it reads"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.Adapter(at="in_proj_weight"), "a.in_proj_weight: this is a parameter, and adapter has nothing to patch there"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, bias=False)}), dk.BitFit(at="out_proj"), "a.out_proj: the module around it reads .* and bitfit has nothing to patch there"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.LoRA(r=2, at="in_proj_bias"), "a.in_proj_bias: LoRA on a parameter expects a matrix"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.LoRA(r=2, dropout=0.1, at="out_proj"), "a.out_proj: LoRA.dropout=0.1. drops inputs"),
        (lambda: build("gpt2", tf.AutoModelForCausalLM), dk.LoRA(r=2, at="lm_head"), "wte.weight, and an update of this module alone"),
        (Transformer, dk.Prefix(at="mlp"), r"layers\.0\.mlp: this MLP has no attention in it"),
        (Transformer, dk.SoftPrompt(at="classifier"), "classifier: soft_prompt expects the embedding of the input ids"),
        (lambda: build("vit"), dk.SoftPrompt(), "ViTModel: it has no embedding of token ids"),
        (lambda: nn.Sequential(nn.Linear(2, 3)), dk.LoRA(r=1), r"lora: no default position: Sequential has no @attn\.q or @attn\.v; name targets with at=, such as at='0'"),
        (nn.Identity, dk.LoRA(r=1), "lora: no default position: Identity has no @attn.q"),
        (lambda: "model", dk.LoRA(), r"attach\(backbone=\'model\'\): expected a torch.nn.Module, found the text \'model\'; load the model first"),
    ],
)  # fmt: skip
def test_bad_targets_change_nothing(unchecked, make, method, message):
    model = make()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(model, method)
    if before is not None:
        same(before, snapshot(model))


def test_a_quantized_weight_that_says_its_dtype_is_served():
    model = nn.ModuleDict({"q": Quantized(compute_dtype=torch.float32)})
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
    with pytest.raises(
        dk.OptionError, match=r"attach\(\): expected a method such as LoRA\(r=8\), found the class LoRA; write LoRA\(\)"
    ):
        dk.attach(Transformer(), dk.LoRA)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 19), nn.ReLU(), nn.Linear(19, 23)),
        lambda: nn.ModuleDict({"words": nn.Embedding(31, 12), "lstm": nn.LSTM(12, 7), "classifier": nn.Linear(14, 11)}),
    ],
    ids=["a layer below the rank", "LSTM"],
)
def test_the_advice_where_there_is_no_default_position_works(make):
    """The advice at='**' with of=nn.Linear led to the next error: rank 8 is above the size of a classifier with 2 classes."""
    model = make()
    with pytest.raises(dk.RoleError) as caught:
        dk.attach(model, dk.LoRA(r=8))
    at = re.search(r"such as at='([^']+)'", str(caught.value))[1]
    delta = dk.attach(model, dk.LoRA(r=8, at=at))
    assert delta.attached
    assert delta.num_parameters > 0


def test_where_only_an_option_does_not_fit_the_advice_is_another_one():
    with pytest.raises(
        dk.RoleError, match=r"such as at='0', and other options: 0: rank 8 is above .*; use LoRA\(r=2\) or less"
    ):
        dk.attach(nn.Sequential(nn.Linear(3, 2)), dk.LoRA(r=8))


def test_no_advice_where_nothing_can_be_served():
    with pytest.raises(dk.RoleError, match="lora cannot serve any of its layers and parameters; use another method"):
        dk.attach(nn.Sequential(nn.LayerNorm(3), nn.ReLU()), dk.LoRA(r=8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, d: dk.attach(m, dk.LoRA(), name=3),
            r"attach\(name=3\): expected a text or None, found the number 3",
        ),
        (
            lambda m, d: dk.attach(m, dk.LoRA(), name="a b"),
            "name='a b': expected a word without dots, spaces and control characters",
        ),
        (lambda m, d: d.parameter_groups(up=1e-3), r"parameter_groups\(up=0.001\): expected a dictionary"),
        (
            lambda m, d: dk.combine(m, {"d": "x"}),
            "expected a dictionary of finite numbers, found a dictionary with the text 'x'",
        ),
        (lambda m, d: dk.combine(m, {"d": 1.0}, rank=0), r"LoRA\(r=0\)"),
        (lambda m, d: setattr(d, "scale", "a"), "scale='a': expected a finite number"),
    ],
    ids=["name", "spaces", "groups", "weights", "rank", "scale"],
)
def test_bad_values_of_other_calls(unchecked, call, message):
    model = Transformer()
    delta = dk.attach(model, dk.LoRA(r=2), name="d")
    with pytest.raises(dk.OptionError, match=message):
        call(model, delta)


def test_a_method_must_say_what_it_builds():
    """Without it, a default position or a parameter would be refused for a wrong reason."""
    with pytest.raises(
        TypeError, match=r"Nameless: set `kind` to the class of its delta modules, or override kind_at\(\)"
    ):

        class Nameless(dk.Method, name="nameless"):
            def build_at(self, target):
                raise AssertionError

    assert "nameless" not in dk.METHODS
