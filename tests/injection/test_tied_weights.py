"""Weights that several layers share."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.changed_weights import check_against_changed_weights
from support.models import attached, randomize
from support.tiny_transformers import build


def test_tied_weights_are_one_delta_or_an_explicit_choice():
    model = build("gpt2", tf.AutoModelForCausalLM).double()
    ids = torch.randint(3, 97, (2, 7))
    with pytest.raises(
        dk.TargetError, match=r"wte: its weight is tied to lm_head\.weight, .* write at='.*wte\.weight'"
    ):
        dk.attach(model, dk.LoRA(r=2, at="wte"))
    check_against_changed_weights(
        model, lambda m: m(input_ids=ids).logits, dk.LoRA(r=2, at="wte.weight"), ["transformer.wte.weight"]
    )
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="lm_head.weight")))
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(delta.merge().backbone(input_ids=ids).logits, logits)
    assert model.lm_head.weight is model.transformer.wte.weight
    delta.detach()
    alone = randomize(dk.attach(model, dk.LoRA(r=2, at="lm_head", untie=True)))
    assert list(alone.modules) == ["lm_head"]


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


class Kernel(nn.Module):
    """Holds the weight of another layer under another name."""

    def __init__(self, weight):
        super().__init__()
        self.kernel = weight

    def forward(self, x):
        return nn.functional.linear(x, self.kernel)


def test_a_tied_weight_that_has_another_name_elsewhere():
    layer = nn.Linear(6, 6, bias=False)
    model, x = nn.Sequential(layer, nn.Tanh(), Kernel(layer.weight)).double(), torch.randn(2, 6, dtype=torch.float64)
    check_against_changed_weights(model, lambda m: m(x), dk.LoRA(r=2, at="0.weight"), ["0.weight"])


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


@pytest.mark.parametrize("copied", [False, True])
def test_loading_a_merged_weight_under_its_other_name(copied):
    """safetensors' `save_model` writes one of the names."""
    model = build("gpt2", tf.AutoModelForCausalLM)
    delta = attached(model, dk.LoRA(r=2, at="transformer.wte.weight"), train=()).merge()
    model = copy.deepcopy(model) if copied else model
    merged, new = model.lm_head.weight.detach().clone(), torch.zeros_like(model.lm_head.weight)
    for part, name in ((model, "lm_head.weight"), (model.lm_head, "weight"), (model.transformer.wte, "weight")):
        with pytest.raises(
            dk.StateError, match=r"weight: delta 'delta' is merged into this weight, .* unmerge\(\) the delta"
        ):
            part.load_state_dict({name: new}, strict=False)
    assert torch.equal(model.lm_head.weight, merged)
    (delta,) = dk.deltas(model)
    delta.detach()
    model.load_state_dict({"lm_head.weight": new}, strict=False)
    assert torch.equal(model.transformer.wte.weight, new)
