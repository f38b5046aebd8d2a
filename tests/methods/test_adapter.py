"""Adapters against their paper's formula in float64, their sizes and their places."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltakit as dk
from support import backbone_zoo
from support.backbone_inputs import inputs
from support.models import Transformer, attached, randomize
from support.tiny_transformers import build


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


def test_adapter_starts_as_the_authors_code_does():
    """A truncated normal of 1e-3 down, cut at twice that; zero up and for the biases, so that it is the identity."""
    state = dk.attach(nn.ModuleDict({"layer": nn.Linear(7, 503)}), dk.Adapter(size=101, at="layer")).state_dict()
    down = state["layer.adapter.down.weight"]
    assert 1.9e-3 < down.abs().max() <= 2e-3
    assert down.std() == pytest.approx(0.88e-3, rel=0.02)
    assert not any(value.any() for name, value in state.items() if not name.endswith("down.weight"))


def test_adapter_sizes_and_norms():
    model = Transformer()
    assert dk.attach(model, dk.Adapter(reduction=7)).modules["layers.0.mlp.down_proj"][0].down.out_features == 2
    delta = dk.attach(Transformer(), dk.Adapter(size=3), train="@norm")
    trained = [name for name, p in delta.backbone.named_parameters() if p.requires_grad and "adapter" not in name]
    assert trained == [name for name, _ in delta.backbone.named_parameters() if "norm" in name]


def test_adapter_after_experts_without_projections():
    model = build("mixtral")
    delta = dk.attach(model, dk.Adapter(size=3))
    assert list(delta.modules) == [
        *(f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.o_proj", "mlp")),
    ] or set(delta.modules) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.o_proj", "mlp")}


def normed(*methods):
    """A norm with random values, its input, and the adapter on it."""
    torch.manual_seed(3)
    norm = nn.LayerNorm(7).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    model = nn.ModuleDict({"norm": norm})
    return norm, model, torch.randn(2, 5, 7, dtype=torch.float64)


def test_an_adapter_that_adds_to_the_input_of_a_norm():
    """Pfeiffer et al.: N(x + f(N(x)))."""
    norm, model, x = normed()
    y = norm(x)
    delta = attached(model, dk.Adapter(size=3, activation="relu", at="norm", add_to="input"))
    adapter = norm.delta_adapter
    change = torch.relu(y @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
    expected = F.layer_norm(x + change, (7,), norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    delta.scale = 0.5
    torch.testing.assert_close(norm(x), (y + expected) / 2, rtol=1e-12, atol=1e-12)
    with dk.rows(model, [delta.name, None]):
        torch.testing.assert_close(norm(x)[0], ((y + expected) / 2)[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(norm(x)[1], y[1])
    delta.detach()
    assert torch.equal(norm(x), y)


def test_adding_to_the_input_starts_as_the_identity_and_keeps_what_others_add():
    norm, model, x = normed()
    y = norm(x)
    delta = dk.attach(model, dk.Adapter(size=3, at="norm", add_to="input"))
    assert torch.equal(norm(x), y)
    other = dk.attach(model, dk.BitFit(at="norm"), name="other")
    delta.detach()
    with torch.no_grad():
        norm.other_bitfit.bias.fill_(2.0)
    delta.attach()
    torch.testing.assert_close(norm(x), y + 2, rtol=1e-12, atol=1e-12)
    other.detach()
    norm(x).sum().backward()


def test_only_norms_can_be_added_to_the_input_of():
    model = nn.ModuleDict({"layer": nn.Linear(7, 7), "groups": nn.GroupNorm(1, 7)})
    for path in model:
        with pytest.raises(dk.TargetError, match=rf"{path}: Adapter\(add_to='input'\) works on norms of the last dim"):
            dk.attach(model, dk.Adapter(size=3, at=path, add_to="input"))


def test_adapter_on_whole_blocks():
    """A block has the hidden states of its parts."""
    model = build("llama")
    delta = dk.attach(model, dk.Adapter(size=3, at="@block"))
    width = model.config.hidden_size
    assert [module.down.in_features for modules in delta.modules.values() for module in modules] == [width, width]


def test_the_size_of_a_part_with_one_layer_is_that_of_the_layer():
    """BERT's `intermediate` has more features than its block, and the block's are those of all other parts."""
    model = build("bert")
    delta = dk.attach(model, dk.Adapter(size=3, at=["intermediate", "layer.0.output"]))
    sizes = {path.rpartition(".")[2]: modules[0].down.in_features for path, modules in delta.modules.items()}
    assert sizes == {"intermediate": 52, "output": 24}
    model(**inputs("bert", model))


def test_the_size_of_a_part_around_one_attention():
    model = build("t5")
    delta = dk.attach(model, dk.Adapter(size=3, at="decoder.block.0.layer.1"))
    assert delta.modules["decoder.block.0.layer.1"][0].down.in_features == 24
    model(**inputs("t5", model))


@pytest.mark.parametrize("kind", ["phimoe", "jetmoe"])
def test_a_router_is_not_the_output_of_its_experts(kind):
    """The router is the only linear layer in the feed-forward part, because the experts are parameters."""
    model, call = backbone_zoo.build(kind)
    before = call(model)
    delta = dk.attach(model, dk.Adapter(size=3))
    found = {len(module.up.bias) for (module,) in delta.modules.values()}
    assert found == {model.config.hidden_size}
    assert torch.equal(call(model), before)


@pytest.mark.parametrize("shape", [(5, 11), (3, 5, 11), (3, 2, 5, 11)])
def test_a_gate_is_one_number_for_each_example(shape):
    layer = nn.Linear(11, 7).double()
    model, x = nn.Sequential(layer), torch.randn(shape, dtype=torch.float64)
    before = model(x)
    delta = dk.attach(model, dk.Adapter(size=3, at="0", gate=True))
    assert torch.equal(model(x), before)
    assert str(delta).count("size=3 gelu gate") == 1
    randomize(delta)
    state = {name.rsplit(".adapter.")[1]: value for name, value in delta.state_dict().items()}
    y = layer.weight @ x[..., None]
    y = y[..., 0] + layer.bias
    g = 1 / (1 + (-(y @ state["gate.weight"].mT + state["gate.bias"])).exp())
    g = g if len(shape) == 2 else g.flatten(1).mean(1).reshape(-1, *[1] * (len(shape) - 1))
    down = F.gelu(y @ state["down.weight"].mT + state["down.bias"])
    expected = y + g * (down @ state["up.weight"].mT + state["up.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
