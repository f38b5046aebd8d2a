"""Weighted sums of deltas, against weights changed by hand."""

import warnings

import pytest
import torch
from models import Transformer, ids, randomize

import deltakit as dk


def updates(delta):
    found = {}
    for path, modules in delta.modules.items():
        for module in modules:
            for name, value in module.weight_update(delta.backbone.get_submodule(path)).items():
                found[f"{path}.{name}"] = found.get(f"{path}.{name}", 0) + value.double()
    return found


def summed(parts):
    total = {}
    for weight, delta in parts:
        for name, value in updates(delta).items():
            total[name] = total.get(name, 0) + weight * value
    return total


def two(model, one, other):
    first, second = dk.attach(model, one, name="a"), dk.attach(model, other, name="b")
    return randomize(first), randomize(second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dk.LoRA(r=2), dk.LoRA(r=3, alpha=5)),
        (dk.LoRA(r=2, at="q_proj"), dk.LoRA(r=2, at=["q_proj", "v_proj"])),
        (dk.BitFit(at="fc"), dk.BitFit(at="fc")),
        (dk.LoRA(r=2, at="embed"), dk.LoRA(r=3, at="embed")),
    ],
    ids=["ranks", "places", "bitfit", "embedding"],
)
def test_sums_are_exact(one, other, tmp_path):
    model = Transformer().eval()
    if one.name == "bitfit":
        one = other = dk.BitFit(at="**.q_proj")
        for layer in model.layers:
            layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(20))
    first, second = two(model, one, other)
    delta, error = dk.combine(model, {"a": 0.7, second: -0.3}, name="mix")
    assert error == 0
    assert (delta.attached, first.attached, second.attached) == (False, True, True)
    wanted, found = summed([(0.7, first), (-0.3, second)]), updates(delta)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    first.detach(), second.detach()
    delta.attach()
    attached = model(ids())
    fresh = Transformer().eval()
    fresh.load_state_dict(dk.base_state_dict(model), strict=False)
    delta.detach()
    delta.attach()
    assert torch.equal(model(ids()), attached)
    assert sorted(dk.load(delta.save(tmp_path), model, name="again", attach=False).modules) == sorted(delta.modules)


def test_a_rank_loses_as_little_as_can_be():
    model = Transformer().eval()
    first, second = two(model, dk.LoRA(r=3, at="q_proj"), dk.LoRA(r=4, at="q_proj"))
    delta, error = dk.combine(model, {"a": 1, "b": 2}, rank=2)
    lost = whole = 0.0
    for name, value in summed([(1, first), (2, second)]).items():
        value = value.detach()
        values = torch.linalg.svdvals(value)
        lost, whole = lost + values[2:].square().sum(), whole + values.square().sum()
        torch.testing.assert_close((updates(delta)[name] - value).norm(), values[2:].norm(), rtol=1e-4, atol=1e-5)
    assert error == pytest.approx(float((lost / whole).sqrt()), rel=1e-6)
    assert 0 < error < 1


def test_a_delta_by_half_is_half_of_it():
    model = Transformer().eval()
    delta = randomize(dk.attach(model, dk.LoRA(r=2), name="a"))
    half, _ = dk.combine(model, {"a": 0.5})
    for name, value in updates(delta).items():
        torch.testing.assert_close(updates(half)[name], value / 2)


@pytest.mark.parametrize(
    ("method", "weights", "error", "message"),
    [
        (dk.Adapter(size=2), {"a": 1.0}, dk.TargetError, "AdapterDelta is not linear in its parameters"),
        (dk.Prefix(tokens=2), {"a": 1.0}, dk.TargetError, "Prefix.*Delta is not linear in its parameters"),
        (dk.LoRA(r=2), {"c": 1.0}, dk.OptionError, "no delta named 'c' is attached; the attached deltas are 'a'"),
        (dk.LoRA(r=2), {}, dk.OptionError, "expected at least one delta"),
        (dk.LoRA(r=2), {"a": float("nan")}, dk.OptionError, "each with a finite number"),
    ],
)
def test_bad_input(method, weights, error, message):
    model = Transformer().eval()
    dk.attach(model, method, name="a")
    with pytest.raises(error, match=message):
        dk.combine(model, weights)


def test_what_is_trained_whole_has_no_sum():
    model = Transformer().eval()
    dk.attach(model, dk.LoRA(r=2), name="a", train="norm")
    with pytest.raises(dk.StateError, match=r"fully trains norm\.weight"):
        dk.combine(model, {"a": 1.0})


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_backbone():
    quantization = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    x = torch.randn(3, 64, requires_grad=True)
    bare, weights = model(x), [layer.weight.dequantize() for layer in model]
    delta = dk.attach(model, dk.LoRA(r=4, at="*"))
    assert torch.equal(model(x), bare)
    randomize(delta, 0.1)
    y = x
    for layer, weight, (lora,) in zip(model, weights, delta.modules.values(), strict=True):
        y = torch.nn.functional.linear(y, weight, layer.bias) + lora.scale * (y @ lora.A.T) @ lora.B.T
    torch.testing.assert_close(model(x), y)
    model(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in delta.parameters())
    with pytest.raises(
        dk.TargetError, match=r"0\.weight: expected a floating-point weight .* as Int8Tensor; leave the delta"
    ):
        delta.merge()
    delta.detach()
    assert torch.equal(model(x), bare)


def quantise(linear):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())


class TestMergingIntoQuantisedWeights:
    """Asked for by the quantiser; what its rounding loses is said, and unmerging is exact."""

    def attached(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64))
        for layer in model:
            quantise(layer)
        return model, randomize(dk.attach(model, dk.LoRA(r=4, at="*")), 0.1)

    @pytest.mark.filterwarnings("ignore:.*Enum subclass")
    def test_it_is_the_delta_but_for_rounding(self):
        model, delta = self.attached()
        x = torch.randn(3, 64)
        hooked, was = model(x), [layer.weight for layer in model]
        wanted = [
            layer.weight.dequantize() + part.update()
            for layer, (part,) in zip(model, delta.modules.values(), strict=True)
        ]
        with pytest.warns(
            dk.DeltaWarning, match=r"delta 'delta' is merged into 2 quantised weights: rounding moved"
        ) as said:
            delta.merge(quantize=quantise)
        assert all(type(layer.weight) is type(weight) for layer, weight in zip(model, was, strict=True))
        lost = sum((layer.weight.dequantize() - one).square().sum() for layer, one in zip(model, wanted, strict=True))
        whole = sum(part.update().square().sum() for (part,) in delta.modules.values())
        assert f"by {float((lost / whole).detach().sqrt()):.3g} of the update's norm" in str(said[0].message)
        alone = torch.nn.functional.linear(x, wanted[0], model[0].bias)
        alone = torch.nn.functional.linear(alone, wanted[1], model[1].bias)
        torch.testing.assert_close(alone, hooked)
        assert 0 < (model(x) - hooked).abs().max() < 0.02 * hooked.abs().max()
        delta.unmerge()
        assert all(layer.weight is weight for layer, weight in zip(model, was, strict=True))
        assert torch.equal(model(x), hooked)

    @pytest.mark.parametrize(
        ("quantize", "error", "message"),
        [
            (lambda linear: None, dk.TargetError, r"0\.weight: quantize= left the weight as it is, in torch.float32"),
            (lambda linear: 1 / 0, ZeroDivisionError, "division"),
            (None, dk.TargetError, r"0\.weight: expected a floating-point weight .* or say by quantize= how"),
        ],
        ids=["none", "raises", "not asked"],
    )
    def test_failure_leaves_no_trace(self, quantize, error, message):
        model, delta = self.attached()
        was = [layer.weight for layer in model]
        with pytest.raises(error, match=message):
            delta.merge(quantize=quantize)
        assert not delta.merged
        assert all(layer.weight is weight for layer, weight in zip(model, was, strict=True))

    def test_a_second_layer_that_fails_brings_the_first_back(self):
        model, delta = self.attached()
        was = [layer.weight for layer in model]
        with pytest.raises(dk.TargetError, match=r"1\.weight: quantize= left"):
            delta.merge(quantize=lambda linear: quantise(linear) if linear.in_features == 64 else None)
        assert all(layer.weight is weight for layer, weight in zip(model, was, strict=True))

    @pytest.mark.filterwarnings("ignore:.*Enum subclass")
    def test_an_update_below_the_steps_is_lost_and_said(self):
        _, delta = self.attached()
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.mul_(1e-2)
        with pytest.warns(dk.DeltaWarning, match="quantised weights: rounding moved them by") as said:
            delta.merge(quantize=quantise)
        share = float(str(said[0].message).partition("moved them by ")[2].split()[0])
        assert share > 1

    @pytest.mark.filterwarnings("ignore:.*Enum subclass")
    def test_a_warning_that_is_an_error_leaves_no_trace(self):
        model, delta = self.attached()
        was, x = [layer.weight for layer in model], torch.randn(3, 64)
        hooked = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error", dk.DeltaWarning)
            with pytest.raises(dk.DeltaWarning):
                delta.merge(quantize=quantise)
        assert not delta.merged
        assert all(layer.weight is weight for layer, weight in zip(model, was, strict=True))
        assert torch.equal(model(x), hooked)

    @pytest.mark.filterwarnings("ignore")
    def test_detached_for_a_while_and_as_it_was(self):
        model, delta = self.attached()
        x = torch.randn(3, 64)
        merged = delta.merge(quantize=quantise).backbone(x)
        with delta.detached():
            assert not torch.equal(model(x), merged)
        assert delta.merged
        assert torch.equal(model(x), merged)

    @pytest.mark.filterwarnings("ignore")
    def test_the_layer_that_is_the_backbone(self):
        layer = torch.nn.Linear(64, 96)
        quantise(layer)
        delta = randomize(dk.attach(layer, dk.LoRA(r=4, at="re:^$")), 0.1)
        assert delta.merge(quantize=quantise).merged


def test_the_bare_state_while_merged():
    model = Transformer().eval()
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    delta = randomize(dk.attach(model, dk.LoRA(r=2))).merge()
    torch.testing.assert_close(dk.base_state_dict(model), bare, rtol=0, atol=0)
    with pytest.raises(dk.StateError, match=r"q_proj\.weight: delta 'delta' is merged into it, and unmerging"):
        model.load_state_dict(bare)
    delta.unmerge()
    model.load_state_dict(bare)
