"""Deltas on weights that torchao quantized, and merging into them by their quantizer."""

import warnings

import pytest
import torch

import deltakit as dk
from support.models import randomize


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_backbone():
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
        y = torch.nn.functional.linear(y, weight, layer.bias) + lora.scaling * (y @ lora.A.T) @ lora.B.T
    torch.testing.assert_close(model(x), y)
    model(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in delta.parameters())
    with pytest.raises(
        dk.TargetError, match=r"0\.weight: expected a floating-point weight .* as Int8Tensor; leave the delta"
    ):
        delta.merge()
    delta.detach()
    assert torch.equal(model(x), bare)


def quantize(linear):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())


def test_a_quantizer_gets_the_weight_without_the_bias():
    model, delta = TestMergingIntoQuantizedWeights().attached()
    biases = []

    def noting(linear):
        biases.append(linear.bias)
        quantize(linear)

    with pytest.warns(dk.DeltaWarning):
        delta.merge(quantize=noting)
    assert biases == [None, None]
    assert all(layer.bias is not None for layer in model)


class TestMergingIntoQuantizedWeights:
    """Asked for by the quantizer; what its rounding loses is said, and unmerging is exact."""

    def attached(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)).eval()
        for layer in model:
            quantize(layer)
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
            dk.DeltaWarning, match=r"delta 'delta' is merged into 2 quantized weights: rounding moved"
        ) as said:
            delta.merge(quantize=quantize)
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
            (lambda linear: None, dk.TargetError, r"0\.weight: quantize= left the weight in torch.float32"),
            (lambda linear: 1 / 0, ZeroDivisionError, "division"),
            (None, dk.TargetError, r"0\.weight: expected a floating-point weight .* or pass quantize="),
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
            delta.merge(quantize=lambda linear: quantize(linear) if linear.in_features == 64 else None)
        assert all(layer.weight is weight for layer, weight in zip(model, was, strict=True))

    @pytest.mark.filterwarnings("ignore:.*Enum subclass")
    def test_an_update_below_the_steps_is_lost_and_said(self):
        _, delta = self.attached()
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.mul_(1e-2)
        with pytest.warns(dk.DeltaWarning, match="quantized weights: rounding moved them by") as said:
            delta.merge(quantize=quantize)
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
                delta.merge(quantize=quantize)
        assert not delta.merged
        assert all(layer.weight is weight for layer, weight in zip(model, was, strict=True))
        assert torch.equal(model(x), hooked)

    @pytest.mark.filterwarnings("ignore")
    def test_detached_for_a_while_and_as_it_was(self):
        model, delta = self.attached()
        x = torch.randn(3, 64)
        merged = delta.merge(quantize=quantize).backbone(x)
        with delta.detached():
            assert not torch.equal(model(x), merged)
        assert delta.merged
        assert torch.equal(model(x), merged)

    @pytest.mark.filterwarnings("ignore")
    def test_the_layer_that_is_the_backbone(self):
        layer = torch.nn.Linear(64, 96)
        quantize(layer)
        delta = randomize(dk.attach(layer, dk.LoRA(r=4, at="re:^$")), 0.1)
        assert delta.merge(quantize=quantize).merged
