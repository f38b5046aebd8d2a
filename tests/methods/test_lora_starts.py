"""LoRA's starts: exactly the backbone before training, and PEFT's start values and outputs, which change the backbone."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltakit as dk
from support.models import Kinds, Transformer, a_layer_of_each_kind, ids, randomize

STARTS = ("gaussian", "pissa", "olora", "orthogonal", "mica")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
each = pytest.mark.parametrize("start", STARTS)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_untrained_they_are_exactly_the_identity(start, dtype):
    model, x = a_layer_of_each_kind()
    model.to(dtype).requires_grad_(False)
    bare = model(x)
    delta = dk.attach(model, dk.LoRA(r=4, alpha=5, start=start, at=Kinds.NAMES))
    assert torch.equal(model(x), bare)
    delta.merge()
    assert torch.equal(model(x), bare)
    delta.detach()
    assert torch.equal(model(x), bare)


@each
def test_trained_they_are_the_change_of_the_product(start):
    layer = nn.Linear(7, 11).double()
    delta = dk.attach(nn.ModuleDict({"layer": layer}), dk.LoRA(r=4, alpha=5, start=start, at="layer"))
    (module,) = delta.modules["layer"]
    a0, b0 = module.A.detach().clone(), module.B.detach().clone()
    randomize(delta)
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    change = 5 / 4 * (module.B @ module.A - b0 @ a0)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + change, layer.bias), **CLOSE)
    assert torch.equal(module.B, b0) == (start == "mica")
    assert not torch.equal(module.A, a0)


def peft_model(model, start, **options):
    config = peft.LoraConfig(r=4, lora_alpha=5, init_lora_weights=start, target_modules=["layer"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
def test_the_start_values_and_the_training_are_those_of_peft(start):
    """PEFT subtracts the product from its weight: after the same step both have the same output."""
    model = nn.ModuleDict({"layer": nn.Linear(7, 11)})
    nn.init.normal_(model.layer.weight)
    theirs = peft_model(copy.deepcopy(model), start).base_model.model.layer
    delta = dk.attach(model, dk.LoRA(r=4, alpha=5, start=start, at="layer"))
    (module,) = delta.modules["layer"]
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    torch.testing.assert_close(module.A, a)
    torch.testing.assert_close(module.B, b)
    x = torch.randn(3, 7)
    for output, own in ((model.layer(x), (module.A, module.B)), (theirs(x), (a, b))):
        trained = [factor for factor in own if factor.requires_grad]
        assert len(trained) == (1 if start == "mica" else 2)
        for factor, gradient in zip(trained, torch.autograd.grad(output.square().sum(), trained), strict=True):
            factor.data -= 0.01 * gradient
    torch.testing.assert_close(model.layer(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_orthogonal_factors_have_no_product():
    model = nn.ModuleDict({"layer": nn.Linear(700, 300)}).double()
    (module,) = dk.attach(model, dk.LoRA(r=6, start="orthogonal", at="layer")).modules["layer"]
    assert (module.B @ module.A).abs().max() < 1e-14
    for factor in (module.A, module.B):
        assert float(factor.detach().std()) == pytest.approx(0.1 / 2**0.5, rel=0.1)


def test_olora_on_a_conv1d_reads_the_weight_as_the_layer_does():
    """PEFT does not: the factors have each other's sizes there, and the next forward fails."""
    model, x = a_layer_of_each_kind()
    (module,) = dk.attach(model, dk.LoRA(r=3, start="olora", at="conv1d")).modules["conv1d"]
    assert (module.A.shape, module.B.shape) == ((3, 11), (5, 3))
    weight = model.conv1d.weight.T
    torch.testing.assert_close(module.B.T @ module.B, torch.eye(3).double(), **CLOSE)
    torch.testing.assert_close(module.A, (module.B.T @ weight).detach(), **CLOSE)
    assert model(x).isfinite().all()


@each
def test_files_sums_and_mixed_batches(start, tmp_path):
    model = Transformer().double().eval()
    fresh = copy.deepcopy(model)
    delta = randomize(dk.attach(model, dk.LoRA(r=4, start=start), name="one"))
    output = model(ids())
    dk.load(delta.save(tmp_path), fresh)
    assert torch.equal(fresh(ids()), output)
    other = randomize(dk.attach(model, dk.LoRA(r=2), name="two"))
    other.active = False
    with dk.rows(model, ["one", None, "one"]):
        torch.testing.assert_close(model(ids())[[0, 2]], output[[0, 2]], **CLOSE)
    half, error = dk.combine(model, {"one": 1.0})
    assert error == 0
    other.detach()
    delta.detach()
    half.attach()
    torch.testing.assert_close(model(ids()), output, **CLOSE)


def test_only_what_is_trained_counts():
    delta = dk.attach(Transformer(), dk.LoRA(r=2, start="mica"))
    plain = dk.attach(Transformer(), dk.LoRA(r=2))
    difference = dk.attach(Transformer(), dk.LoRA(r=2, start="pissa"))
    assert 2 * delta.num_parameters == plain.num_parameters == difference.num_parameters
    assert {group["tag"] for group in delta.parameter_groups(down={"lr": 1.0})} == {"down"}
    assert "r=2 alpha=16 mica" in repr(delta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "svd"}, r"LoRA\(start='svd'\)"),
        ({"start": "orthogonal", "r": 3}, r"LoRA\(r=3, start='orthogonal'\): expected an even rank"),
        ({"start": "pissa", "alpha": 0}, r"LoRA\(alpha=0, start='pissa'\): expected an alpha above 0"),
    ],
)
def test_bad_options(unchecked, options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.LoRA(**options)
