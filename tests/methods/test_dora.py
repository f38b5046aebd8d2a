"""DoRA against its paper's formula in float64 and against PEFT's training, beside other deltas, and where a weight is read."""

import copy

import accelerate
import peft
import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.core import bare_weight
from support.models import Kinds, Transformer, a_layer_of_each_kind, attached, ids, randomize, same, snapshot
from support.quantized_layers import quantized_backbone

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def dora(**options):
    return dk.LoRA(r=3, alpha=5, dora=True, **options)


def new_weight(weight, module):
    """W' of the paper's equation 5 for a weight [..., out, in], in float64: with the product B A, and the norm of the sum."""
    a, b, m = (module._parameters[name].detach().double() for name in ("A", "B", "m"))
    weight = weight.detach().double()
    direction = weight + 5 / 3 * b @ a
    m = (weight**2).sum(-1).sqrt() + m
    return m[..., None] * direction / (direction**2).sum(-1, keepdim=True).sqrt()


def put(model, name, matrix):
    """Sets the weight of a layer of `Kinds` to a matrix [out, in]."""
    weight = getattr(model, name).weight
    weight.copy_(matrix.T if name in ("embedding", "conv1d") else matrix.view_as(weight))


@pytest.mark.parametrize("name", Kinds.NAMES)
@torch.no_grad()
def test_it_is_its_formula(name):
    model, x = a_layer_of_each_kind()
    twin, bare = copy.deepcopy(model), model(x)
    delta = attached(model, dora(at=name))
    (module,) = delta.modules[name]
    weight = bare_weight(getattr(model, name), module.view).clone()
    put(twin, name, new_weight(weight, module))
    assert not torch.allclose(model(x), bare)
    torch.testing.assert_close(model(x), twin(x), **CLOSE)
    delta.merge()
    torch.testing.assert_close(model(x), twin(x), **CLOSE)
    delta.unmerge()
    # Half of the strength is half of the change of the weight.
    delta.scale = 0.5
    expected = weight + 0.5 * (new_weight(weight, module) - weight)
    put(twin, name, expected)
    torch.testing.assert_close(model(x), twin(x), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untrained_it_is_exactly_the_identity(dtype):
    model, x = a_layer_of_each_kind()
    model.to(dtype).requires_grad_(False)
    bare, before = model(x), snapshot(model)
    delta = dk.attach(model, dora(at=Kinds.NAMES))
    assert torch.equal(model(x), bare)
    delta.merge()
    assert torch.equal(model(x), bare)
    delta.unmerge()
    delta.detach()
    same(before, snapshot(model))


def test_the_parts_of_the_gradient_are_those_with_a_constant_norm():
    """Section 4.3. The full gradient would have a term along each row, which this one must not have."""
    layer = nn.Linear(7, 11).double()
    delta = attached(nn.ModuleDict({"layer": layer}), dora(at="layer"))
    (module,) = delta.modules["layer"]
    x, weight = torch.randn(5, 7, dtype=torch.float64), layer.weight.detach()
    direction = weight + 5 / 3 * module.B @ module.A
    norm = direction.norm(dim=1).detach()
    expected = x @ (((weight.norm(dim=1) + module.m) / norm)[:, None] * direction).T + layer.bias
    g, own = torch.randn_like(expected), list(delta.parameters())
    for found, wanted in zip(torch.autograd.grad(layer(x), own, g), torch.autograd.grad(expected, own, g), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("layer", [nn.Linear(7, 11), nn.Conv2d(7, 11, 3)], ids=["linear", "convolution"])
def test_dropout_is_that_of_peft(layer):
    """The dropped inputs are those of the whole update, in PEFT as in the authors' code."""
    model = nn.ModuleDict({"layer": layer.double()}).train()
    twin = copy.deepcopy(model)
    options = {"target_modules": ["layer"], "lora_dropout": 0.5, "use_dora": True}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=5, **options), twin).layer
    delta = attached(model, dora(at="layer", dropout=0.5))
    (module,) = delta.modules["layer"]
    with torch.no_grad():
        for name, value in (("A", theirs.lora_A), ("B", theirs.lora_B)):
            value["default"].weight.copy_(getattr(module, name).view_as(value["default"].weight))
        magnitude = theirs.lora_magnitude_vector["default"].weight
        magnitude.add_(module.m.view_as(magnitude))
    x = torch.randn(2, 5, 7, dtype=torch.float64) if layer.weight.ndim == 2 else torch.randn(2, 7, 5, 6).double()
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    assert not torch.allclose(layer(x), expected)


@pytest.mark.parametrize("name", Kinds.NAMES)
@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_it_adds_to_other_deltas(name, first):
    """Its norm is that of the backbone's own weight, so the order of the deltas does not count."""
    model, x = a_layer_of_each_kind()
    twin, methods = copy.deepcopy(model), [dk.LoRA(r=2, at=name), dora(at=name)]
    deltas = [attached(model, method, name=f"d{method.r}") for method in (methods[::-1] if first else methods)]
    (module,), (plain,) = (delta.modules[name] for delta in sorted(deltas, key=lambda delta: delta.name, reverse=True))
    weight = bare_weight(getattr(twin, name), module.view)
    put(twin, name, new_weight(weight, module) + plain.update())
    torch.testing.assert_close(model(x), twin(x), **CLOSE)


def test_parameters_and_weights_that_are_read():
    model = nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True).double().eval()
    x, twin = torch.randn(2, 5, 6, dtype=torch.float64), copy.deepcopy(model)
    delta = attached(model, dora(at=["self_attn.out_proj", "self_attn.in_proj_weight", "linear1"]))
    modules = {path: module for path, (module,) in delta.modules.items()}
    with torch.no_grad():
        for path, module in modules.items():
            weight = twin.get_parameter(path if path.endswith("weight") else f"{path}.weight")
            weight.copy_(new_weight(weight, module))
    model.train(), twin.train()
    torch.testing.assert_close(model(x), twin(x), **CLOSE)


@torch.no_grad()
def test_each_example_has_its_own():
    model, x = Transformer().double().eval(), ids(4)
    bare, methods = model(x), {"a": dora(), "b": dk.LoRA(r=2), "c": dora()}
    for name, method in methods.items():
        attached(model, method, name=name)
    alone = {}
    for name in methods:
        with dk.use(model, name):
            alone[name] = model(x)
    with dk.rows(model, ["c", None, "a", "b"]):
        mixed = model(x)
    for row, expected in enumerate((alone["c"], bare, alone["a"], alone["b"])):
        torch.testing.assert_close(mixed[row], expected[row], **CLOSE)
    assert not torch.allclose(alone["a"], alone["c"])


def test_it_has_no_weighted_sum():
    model = Transformer()
    delta, plain = attached(model, dora(), name="one"), attached(model, dk.LoRA(r=2), name="two")
    for weights in ({"one": 0.5}, {"two": 0.5, "one": 0.5}):
        with pytest.raises(dk.TargetError, match="DoRA is not linear in its parameters, so it has no weighted sums"):
            dk.combine(model, weights)
    (module,), *_ = delta.modules.values()
    with pytest.raises(dk.TargetError, match="not linear in its parameters"):
        module.take_sum([(1.0, module)])
    assert plain.name == "two"


def test_a_row_of_zeros_stays_finite():
    layer = nn.Linear(5, 7)
    nn.init.zeros_(layer.weight[2:4])
    delta = dk.attach(nn.ModuleDict({"layer": layer}), dora(at="layer"))
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    randomize(delta)
    layer(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in delta.parameters())


def test_a_resized_embedding_is_refused():
    model = nn.ModuleDict({"words": nn.Embedding(11, 6)})
    dk.attach(model, dora(at="words"))
    model.words.weight.data = torch.randn(13, 6)
    for word in (1, 12):
        with pytest.raises(dk.StateError, match=r"attached to .* 11(, and it is 6 x 13 now| ids).* was resized"):
            model.words(torch.tensor([word]))


def test_on_quantized_weights():
    model = quantized_backbone("gptq", "llama")
    x = torch.randint(3, 90, (2, 5))
    bare, twin = model(x)[0], copy.deepcopy(model)
    delta = dk.attach(model, dora())
    assert torch.equal(model(x)[0], bare)
    randomize(delta)
    found = model(x)[0]
    assert not torch.allclose(found, bare)
    for path, (module,) in delta.modules.items():
        packed = model.get_submodule(path)
        weight = bare_weight(packed, module.view)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight.data = new_weight(weight, module).float()
        twin.set_submodule(path, plain)
    torch.testing.assert_close(twin(x)[0], found, rtol=1e-5, atol=1e-5)


def test_a_quantized_embedding_is_refused():
    layer = nn.Embedding(11, 6)
    layer.weight = nn.Parameter(torch.ones(11, 6, dtype=torch.int8), requires_grad=False)
    layer.compute_dtype = torch.float32
    with pytest.raises(
        dk.TargetError, match="words: DoRA needs the norms of the weight, .* use LoRA without dora=True"
    ):
        dk.attach(nn.ModuleDict({"words": layer}), dora(at="words"))


def test_an_offloaded_weight_is_refused():
    model = nn.ModuleDict({"layer": nn.Linear(5, 7)})
    dk.attach(model, dora(at="layer"))
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(dk.StateError, match=r"has no values here \(meta device or offload\); load it into memory"):
        model.layer(torch.randn(3, 5))


def test_autocast_does_not_round_the_norms():
    model = Transformer().eval()
    delta = attached(model, dora())
    (module,), *_ = delta.modules.values()
    weight = bare_weight(model.get_submodule(next(iter(delta.modules))), module.view)
    gain = module.gain(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.gain(weight), gain)
        assert model(ids()).isfinite().all()


def test_its_tag_and_its_summary():
    delta = dk.attach(Transformer(), dora())
    assert "r=3 alpha=5 dora" in repr(delta)
    groups = delta.parameter_groups(magnitude={"lr": 0.5})
    assert {group["tag"]: (group.get("lr"), len(group["params"])) for group in groups} == {
        "": (None, 8),
        "magnitude": (0.5, 4),
    }
