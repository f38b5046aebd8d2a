"""LoRA-FA: A stays as it starts, and its inputs are not kept for the backward pass."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltakit as dk
from support.models import Kinds, Transformer, a_layer_of_each_kind, ids, randomize
from support.peft_layers import CLOSE
from support.peft_models import close, outputs, read_by_peft, wide

TOKENS, D_IN, R = 13, 11, 3


def layers(**options):
    """Two layers of which the second needs the gradient of its input."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(D_IN, 7), nn.Linear(7, 5)).double()
    delta = randomize(dk.attach(model, dk.LoRA(r=R, alpha=5, at=["0", "1"], **options)))
    return model, delta


def kept(model, x):
    """The numbers that a forward keeps for the backward pass, without the model's own, by shape."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sorted(shapes)


@pytest.mark.parametrize("asks", [True, False])
def test_only_the_product_with_a_is_kept(asks):
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=asks)
    assert kept(layers(frozen_a=True)[0], x) == [(R, TOKENS)] * 2
    assert kept(layers()[0], x) == [(R, TOKENS)] * 2 + [(TOKENS, 7), (TOKENS, D_IN)]
    model, _ = layers(frozen_a=True)
    # The plain formula, too.
    with torch.autocast("cpu", torch.bfloat16):
        assert (TOKENS, D_IN) not in kept(model, x)
    # And examples with a delta each.
    for frozen in (True, False):
        model, delta = layers(frozen_a=frozen)
        with dk.rows(model, [delta.name] * TOKENS):
            # It is kept as x^T.
            assert ((TOKENS, D_IN, 1) in kept(model, x[:, None])) != frozen


def test_values_and_gradients_are_those_of_the_formula():
    model, delta = layers(frozen_a=True)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=True)
    (one,), (two,) = delta.modules["0"], delta.modules["1"]
    assert [module.A.requires_grad for module in (one, two)] == [False, False]
    wanted = x
    for layer, module in zip(model, (one, two), strict=True):
        wanted = F.linear(wanted, layer.weight, layer.bias) + 5 / 3 * wanted @ module.A.T @ module.B.T
    torch.testing.assert_close(model(x), wanted, **CLOSE)
    inputs = [x, one.B, two.B]
    found = torch.autograd.grad(model(x).square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), inputs), **CLOSE)


@pytest.mark.parametrize("start", ["kaiming", "gaussian", "pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_step_on_every_kind_of_layer_changes_b_alone(start, dora):
    model, x = a_layer_of_each_kind()
    bare = model.requires_grad_(False)(x)
    method = dk.LoRA(r=4, start=start, dora=dora, frozen_a=True, at=Kinds.NAMES)
    delta = dk.attach(model, method)
    assert torch.equal(model(x), bare)
    before = {name: value.clone() for name, value in delta.state_dict().items()}
    assert {group["tag"] for group in delta.parameter_groups(up={"lr": 1.0})} == ({"up", ""} if dora else {"up"})
    model(x).square().sum().backward()
    torch.optim.SGD(delta.parameters(), lr=0.1).step()
    assert not torch.allclose(model(x), bare)
    for name, value in delta.state_dict().items():
        assert torch.equal(value, before[name]) == (name.rpartition(".")[2] in ("A", "A0", "B0")), name


def test_files_sums_and_peft(tmp_path):
    model = Transformer().double().eval()
    fresh = copy.deepcopy(model)
    delta = randomize(dk.attach(model, dk.LoRA(r=R, frozen_a=True)))
    output = model(ids())
    assert "r=3 alpha=16 frozen A" in repr(delta)
    assert 2 * delta.num_parameters == dk.plan(fresh, dk.LoRA(r=R)).num_parameters
    loaded = dk.load(delta.save(tmp_path), fresh)
    assert torch.equal(fresh(ids()), output)
    assert not any("A" in name.split(".") for name, _ in loaded.named_parameters())
    # A sum is a LoRA; of several with one A the rank that they share is enough.
    other = copy.deepcopy(delta.state_dict())
    mix, error = dk.combine(model, {"delta": 2.0}, rank=R)
    assert (error < 1e-10, mix.methods[0].frozen_a) == (True, False)
    assert other.keys() == delta.state_dict().keys()
    delta.detach()
    mix.attach()
    mix.scale = 0.5
    torch.testing.assert_close(model(ids()), output, **CLOSE)


def test_peft_opens_it_as_a_lora(tmp_path):
    model = wide("llama")
    delta = randomize(dk.attach(model, dk.LoRA(r=R, frozen_a=True, at=["q_proj", "embed_tokens"])))
    delta.save(tmp_path, format="peft")
    close("llama", read_by_peft("llama", tmp_path), outputs("llama", model))


def test_training_ends_where_that_of_peft_does():
    """PEFT's LoRA-FA is an optimiser, which also maps the gradient of B; without that its parameters train as here."""
    model, delta = layers(frozen_a=True)
    twin, plain = layers()
    plain.load_state_dict(delta.state_dict())
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    for own, group in (
        (model, delta.parameters()),
        (twin, [p for n, p in plain.named_parameters() if n.endswith(".B")]),
    ):
        optimizer = torch.optim.SGD(list(group), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            own(x).square().sum().backward()
            optimizer.step()
    for name, value in delta.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], **CLOSE)


def test_nothing_to_train():
    with pytest.raises(dk.OptionError, match=r"LoRA\(frozen_a=True, start='mica'\): then nothing is trained, because"):
        dk.LoRA(frozen_a=True, start="mica")


@pytest.mark.parametrize("asks", [True, False])
def test_second_derivatives_that_need_the_inputs_are_refused(asks):
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=asks)
    model, delta = layers(frozen_a=True)
    loss, b = model(x).square().sum(), list(delta.parameters())[-1]
    if asks:
        with pytest.raises(dk.StateError, match="low-rank update with a frozen A does not keep; train A"):
            torch.autograd.grad(loss, b, create_graph=True)
    torch.autograd.grad(loss, b)
