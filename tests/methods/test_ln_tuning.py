"""LN-tuning against its formula in float64 and against PEFT, on every kind of norm; sums, merging and bad targets."""

import copy

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer, attached, ids, randomize, same, snapshot
from support.peft_layers import CLOSE
from support.tiny_transformers import build

KINDS = {
    # What PEFT trains by default, where it trains what the paper does.
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    # Its weight w stands for 1 + w.
    "gemma3_text": ["layers.0.input_layernorm", "norm"],
}


def hidden(kind, model):
    return model(input_ids=ids(3, 7)).last_hidden_state


@torch.no_grad()
def test_it_is_its_formula():
    model = nn.Sequential(nn.LayerNorm(7)).double().eval()
    nn.init.normal_(model[0].weight)
    x, weight, bias = torch.randn(2, 5, 7).double(), model[0].weight.clone(), model[0].bias.clone()
    delta = attached(model, dk.LNTuning(at="0"))
    change = delta.state_dict()
    assert {name: value.shape for name, value in change.items()} == {
        "0.weight.ln_tuning.change": (7,),
        "0.bias.ln_tuning.change": (7,),
    }
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    change_w, change_b = change["0.weight.ln_tuning.change"], change["0.bias.ln_tuning.change"]
    expected = normed * (weight + change_w) + bias + change_b
    torch.testing.assert_close(model(x), expected, **CLOSE)
    delta.scale = 0.5
    torch.testing.assert_close(model(x), normed * (weight + change_w / 2) + bias + change_b / 2, **CLOSE)
    delta.scale = 1.0
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)
    torch.testing.assert_close(model[0].weight, weight + change_w, **CLOSE)


# What transformers renames, and norms that PEFT does not know by name.
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Unsupported layer type:UserWarning"
)
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_outputs_and_gradients(kind):
    peft = pytest.importorskip("peft")
    model = build(kind).double()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LNTuningConfig(target_modules=KINDS[kind]))
    trained = {
        name.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): parameter
        for name, parameter in theirs.named_parameters()
        if "ln_tuning" in name
    }
    at = sorted({name.rpartition(".")[0] for name in trained})
    delta = dk.attach(model, dk.LNTuning(at=at) if kind == "gemma3_text" else dk.LNTuning())
    assert {name.removesuffix(".ln_tuning.change") for name in delta.state_dict()} == trained.keys()
    bare = hidden(kind, theirs)
    assert torch.equal(hidden(kind, model), bare)
    randomize(delta)
    with torch.no_grad():
        for name, change in delta.state_dict().items():
            trained[name.removesuffix(".ln_tuning.change")].add_(change)
    found, expected = hidden(kind, model), hidden(kind, theirs)
    assert not torch.allclose(found, bare, atol=1e-3)
    torch.testing.assert_close(found, expected, **CLOSE)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, change in delta.named_parameters():
        torch.testing.assert_close(change.grad, trained[name.removesuffix(".ln_tuning.change")].grad, **CLOSE)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm2d(5), (2, 5, 3, 7)), (nn.GroupNorm(5, 10), (2, 10, 7)), (nn.RMSNorm(7), (2, 3, 7))],
    ids=["batch", "group", "RMS"],
)
def test_other_norms(norm, shape):
    model, x = nn.Sequential(norm).double().eval(), torch.randn(shape, dtype=torch.float64)
    before, bare = snapshot(model), model(x)
    delta = dk.attach(model, dk.LNTuning())
    assert torch.equal(model(x), bare)
    found = randomize(delta).backbone(x)
    twin = copy.deepcopy(model)
    (copied,) = dk.deltas(twin)
    torch.testing.assert_close(copied.merge().backbone(x), found, **CLOSE)
    delta.detach()
    same(before, snapshot(model))


def test_sums():
    model = Transformer().double().eval()
    one, two = attached(model, dk.LNTuning(), name="one"), attached(model, dk.LNTuning(at="norm_1"), name="two")
    first, second = one.state_dict(), two.state_dict()
    total = dk.combine(model, {one: 0.5, two: -2.0}).delta.state_dict()
    assert total.keys() == first.keys()
    for name, value in total.items():
        torch.testing.assert_close(value, 0.5 * first[name] - 2 * second.get(name, torch.zeros(())), **CLOSE)


def test_some_norms():
    delta = dk.attach(Transformer(), dk.LNTuning(at="@norm", exclude=["layers.1.norm_2", "norm.bias"]))
    assert list(delta.modules) == [
        *(f"layers.{norm}.{name}" for norm in ("0.norm_1", "0.norm_2", "1.norm_1") for name in ("weight", "bias")),
        "norm.weight",
    ]


@pytest.mark.parametrize(
    ("model", "at", "message"),
    [
        (Transformer(), "layers.0.mlp", "^layers.0.mlp: LNTuning trains the weights and biases of norms, found a MLP; select a norm, or leave"),
        (Transformer(), "layers.0", "^layers.0: LNTuning trains .* found a Block; select the norms in it, at='layers.0/@norm', or"),
        (Transformer(), "classifier.bias", "^classifier.bias: LNTuning trains .* found a Linear"),
        (nn.Sequential(nn.LayerNorm(7, elementwise_affine=False)), None, "ln_tuning: Sequential has no norm with a weight"),
        (nn.Sequential(nn.Linear(7, 3)), None, "norm"),
    ],
)  # fmt: skip
def test_bad_targets(model, at, message):
    before = snapshot(model)
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(model, dk.LNTuning(at=at))
    same(before, snapshot(model))
