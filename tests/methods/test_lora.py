"""LoRA against its paper's formula in float64, against PEFT, and against its authors' starting values."""

import copy
import math

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import Kinds, Transformer, a_layer_of_each_kind, attached, ids, randomize
from support.tiny_transformers import build


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_equals_peft_on_the_same_weights(rslora):
    model, x = a_layer_of_each_kind()
    twin = copy.deepcopy(model)
    delta = attached(model, dk.LoRA(r=3, alpha=5, rslora=rslora, at=Kinds.NAMES))
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=list(Kinds.NAMES), fan_in_fan_out=False
    )
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        other = peft.get_peft_model(twin, config).eval().double()
    state = {name: value.detach() for name, value in delta.state_dict().items()}
    layers = other.base_model.model
    with torch.no_grad():
        for name in Kinds.NAMES:
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


@pytest.mark.parametrize(("inner", "outer"), [(7, 5), (5, 7)])
def test_the_rank_may_be_as_large_as_the_smaller_side(inner, outer):
    """A full rank is of use, in combinations for example; one more is not."""
    model = nn.ModuleDict({"layer": nn.Linear(inner, outer)})
    assert dk.attach(model, dk.LoRA(r=5, at="layer")).detach().num_parameters == 5 * (5 + 7)
    with pytest.raises(
        dk.OptionError, match=r"layer: rank 6 is above the layer's size \d to \d; use LoRA\(r=5\) or less"
    ):
        dk.attach(model, dk.LoRA(r=6, at="layer"))


def test_lora_starts_as_the_authors_code_does():
    layers = nn.ModuleDict({"linear": nn.Linear(700, 300), "embedding": nn.Embedding(500, 300)})
    state = dk.attach(layers, dk.LoRA(r=8, at="*")).state_dict()
    assert not state["linear.lora.B"].any()
    assert not state["embedding.lora.A"].any()
    bound = math.sqrt(1 / 700)
    assert state["linear.lora.A"].abs().max() == pytest.approx(bound, rel=0.01)
    assert state["linear.lora.A"].std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert state["embedding.lora.B"].std() == pytest.approx(1, rel=0.05)


def test_dropout_is_on_the_update_and_in_training_only():
    model = Transformer().eval()
    delta = attached(model, dk.LoRA(r=3, dropout=0.5))
    still = model(ids())
    assert torch.equal(model(ids()), still)
    model.train()
    assert not torch.equal(model(ids()), model(ids()))
    assert "dropout=0.5" in repr(delta)


@pytest.mark.parametrize("graph", [True, False])
def test_dropout_drops_the_input_of_the_update_and_nothing_else(graph):
    """Otherwise the backbone itself would compute with holes in training: in its output, or in the gradient of its input."""
    layer = nn.Linear(7, 11).double()
    delta = attached(nn.ModuleDict({"layer": layer}).train(), dk.LoRA(r=3, alpha=5, dropout=0.5, at="layer"))
    a, b = delta.state_dict().values()
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(3)
    wanted = plain + 5 / 3 * nn.functional.dropout(x, 0.5) @ a.T @ b.T
    torch.manual_seed(3)
    with torch.set_grad_enabled(graph):
        found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if graph:
        g = torch.randn_like(wanted)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, g) for y in (found, wanted)), rtol=1e-12, atol=1e-12)


def test_the_groups_of_an_optimiser_hold_everything_once():
    """LoRA+ (arXiv:2402.12354): the two factors in groups of their own, and what has no tag must not get lost."""
    model = Transformer()
    delta = dk.attach(model, dk.LoRA(r=3), dk.BitFit(at="@ff.up"), train="norm")
    groups = {group["tag"]: group for group in delta.parameter_groups(up={"lr": 0.5}, fully_trained={"lr": 0.25})}
    assert {tag: (group.get("lr"), len(group["params"])) for tag, group in groups.items()} == {
        "": (None, 4 + 2),
        "up": (0.5, 4),
        "fully_trained": (0.25, 2),
    }
    held = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, delta.parameters()))


def test_the_padding_of_an_embedding_is_not_trained():
    model = nn.Sequential(nn.Embedding(7, 6, padding_idx=2))
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="0")))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    (lora,) = delta.modules["0"]
    assert not lora.A.grad[:, 2].any()
    assert lora.A.grad[:, 1].all()


@pytest.mark.parametrize("fused", [False, True])
def test_attributes_come_when_a_delta_module_is_built(fused):
    """Then Python keeps their names once for all of them (`AttachedModule.__init__`)."""
    model = (
        build("gpt2", tf.AutoModel, num_hidden_layers=2) if fused else nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    )
    at = "@attn.{q,v}" if fused else "{0-1}"
    delta, _ = (dk.attach(model, dk.LoRA(r=2, at=at), name=name) for name in ("one", "other"))
    model(torch.tensor([[1, 2]]) if fused else torch.randn(1, 5))
    delta.detach()
    delta.attach()
    names = {tuple(vars(site.module)) for one in dk.deltas(model) for site in one._attachment.sites}
    assert len(names) == 1
    (names,) = names
    assert names[-1] == "options"
    # CPython has room for no more.
    assert len(names) <= 29
