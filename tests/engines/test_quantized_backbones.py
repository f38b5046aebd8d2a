"""Deltas on quantized backbones, whatever quantized them, and in the dtype that these compute in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltakit as dk
from deltakit.files.fingerprint import differences, fingerprint
from deltakit.opendelta import LoraModel
from support.backbone_inputs import hidden, inputs
from support.models import randomize, same, snapshot
from support.quantized_layers import KINDS, AWQLike, GPTQLike, PackedLinear, quantized_backbone
from support.tiny_transformers import build

METHODS = (dk.LoRA(r=2), dk.Adapter(size=3), dk.BitFit())
BOTH = pytest.mark.parametrize("architecture", ["bert", "llama"])


def run(model, architecture):
    return hidden(model(**inputs(architecture, model)))


@pytest.mark.parametrize("kind", KINDS)
@BOTH
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_untrained_is_the_backbone_and_detach_is_exact(kind, architecture, method):
    model = quantized_backbone(kind, architecture)
    bare = run(model, architecture)
    before = snapshot(model)
    delta = dk.attach(model, method)
    assert torch.equal(run(model, architecture), bare)
    randomize(delta)
    assert not torch.equal(run(model, architecture), bare)
    out = run(model, architecture)
    (out * torch.randn(out.shape)).sum().backward()
    assert all(parameter.grad.any() for parameter in delta.parameters())
    delta.detach()
    same(before, snapshot(model))
    assert torch.equal(run(model, architecture), bare)


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_trained_is_the_formula_on_top_of_what_the_quantized_layer_gives(kind, architecture):
    model = quantized_backbone(kind, architecture)
    layer = model.get_submodule(dk.roles(model)["@ff.up"][0])
    x, direction = torch.randn(2, 5, 24), torch.randn(2, 5, 52)
    given = x.clone().requires_grad_()
    bare = layer(given)
    bare.backward(direction)
    delta = randomize(dk.attach(model, *(type(m)(**vars(m) | {"at": "@ff.up"}) for m in METHODS)), 0.1)
    lora, adapter, bitfit = delta.modules[dk.roles(model)["@ff.up"][0]]
    expected = bare.detach() + lora.scaling * x @ lora.A.T @ lora.B.T
    expected = expected + F.linear(
        F.gelu(F.linear(expected, adapter.down.weight, adapter.down.bias)), adapter.up.weight, adapter.up.bias
    )
    torch.testing.assert_close(layer(x), expected + bitfit.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected + bitfit.bias)
    # With LoRA alone the gradient of the input is known too.
    delta.detach()
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="@ff.up")))
    ((lora,), *_) = delta.modules.values()
    again = x.clone().requires_grad_()
    layer(again).backward(direction)
    torch.testing.assert_close(again.grad, given.grad + lora.scaling * direction @ lora.B @ lora.A)


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_saved_and_loaded(kind, architecture, tmp_path):
    model = quantized_backbone(kind, architecture)
    randomize(dk.attach(model, *METHODS, dk.Prefix(tokens=2))).save(tmp_path)
    fresh = quantized_backbone(kind, architecture)
    assert not torch.equal(run(fresh, architecture), run(model, architecture))
    dk.load(tmp_path, fresh)
    assert torch.equal(run(fresh, architecture), run(model, architecture))


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_counts_and_shapes_are_those_of_the_model(kind, architecture):
    model, full = quantized_backbone(kind, architecture), build(architecture).requires_grad_(False)
    names = {type(full.get_submodule(path)).__name__ for path in dk.roles(full)["@ff.up"]}
    (own,) = {type(model.get_submodule(path)).__name__ for path in dk.roles(model)["@ff.up"]}
    assert names == {"Linear"}
    for fold in (True, False):
        shown, expected = (str(dk.show(m, fold=fold)) for m in (model, full))
        # Only the classes differ. The columns at the right depend on the width of the lines.
        assert " ".join(shown.replace(f"({own})", "(Linear)").split()) == " ".join(expected.split())
    plans = [repr(dk.plan(m, dk.LoRA(r=2))) for m in (model, full)]
    assert plans[0] == plans[1]
    printed = [repr(dk.attach(m, dk.LoRA(r=2))) for m in (model, full)]
    assert printed[0] == printed[1]


@pytest.mark.parametrize("kind", KINDS)
def test_opendelta_s_log_counts_the_model(kind, capsys):
    lines = []
    for model in (quantized_backbone(kind, "bert"), build("bert")):
        LoraModel(model).log(trainable_ratio=False, cuda_memory=False)
        lines.append(capsys.readouterr().err)
    assert lines[0].startswith("Delta Parameter Ratio: ")
    assert lines[0] == lines[1]


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_a_delta_moves_between_a_quantized_backbone_and_the_full_one(kind, architecture, tmp_path):
    for number, (first, second) in enumerate(
        [
            (quantized_backbone(kind, architecture), build(architecture)),
            (build(architecture), quantized_backbone(kind, architecture)),
            (quantized_backbone(kind, architecture), quantized_backbone("gptq", architecture)),
        ]
    ):
        folder = tmp_path / str(number)
        delta = randomize(dk.attach(first, dk.LoRA(r=2)))
        delta.save(folder)
        loaded = dk.load(folder, second)
        for one, two in zip(delta.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_another_model_is_refused_whether_it_is_quantized_or_not(kind, architecture, tmp_path):
    """Only the linear layers' weights differ, so that none of the values that are compared exactly does."""

    def other(module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    full = build(architecture)
    randomize(dk.attach(full, dk.LoRA(r=2))).save(tmp_path / "full")
    randomize(dk.attach(quantized_backbone(kind, architecture), dk.LoRA(r=2))).save(tmp_path / "quantized")
    torch.manual_seed(3)
    for folder, backbone in (
        ("full", quantized_backbone(kind, architecture, change=other)),
        ("quantized", quantized_backbone(kind, architecture, change=other)),
        ("quantized", build(architecture).apply(other)),
    ):
        with pytest.raises(dk.BackboneMismatch, match="the weights differ (by more than quantization rounds, )?in"):
            dk.load(tmp_path / folder, backbone)
    smaller = build(architecture, intermediate_size=44)
    with pytest.raises(
        dk.BackboneMismatch, match=r"with (25,448|14,544) parameters, found a \w+ with (24,664|13,392);"
    ):
        dk.load(tmp_path / "quantized", smaller)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_stored_shapes_still_loads(kind, tmp_path):
    """Files of deltakit 0.1 have a hash of the names and shapes as they were stored, and no values of quantized weights."""
    model = quantized_backbone(kind, "bert")
    found = fingerprint(model)
    old = {**found, "structure": found.get("packed", found["structure"]), "parameters": 7}
    old.pop("packed", None), old.pop("rounded")
    assert differences(old, fingerprint(quantized_backbone(kind, "bert"))) == []
    if kind != "bitsandbytes_8bit":
        (reason,) = differences(old, fingerprint(build("bert")))
        assert "names or shapes differ" in reason


@pytest.mark.parametrize("kind", KINDS)
def test_looking_at_weights_changes_no_layer(kind):
    """bitsandbytes' 8-bit layers split their weight in their first call."""
    model = quantized_backbone(kind, "bert")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = snapshot(model)
    assert fingerprint(model)["rounded"]
    same(state, snapshot(model))
    assert all(vars(module).keys() == before[name].keys() for name, module in model.named_modules())
    weights = [module.weight for module in model.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    assert all(getattr(weight, "CB", 0) is not None for weight in weights)


def test_a_layer_without_a_kernel_here_has_no_values(tmp_path):
    class NoKernel(PackedLinear):
        def forward(self, input):
            raise NotImplementedError("no kernel for this device")

    model = nn.Sequential(nn.Embedding(11, 7), NoKernel(nn.Linear(7, 5), torch.float32))
    found = fingerprint(model)
    assert "rounded" not in found
    assert found["structure"] == fingerprint(nn.Sequential(nn.Embedding(11, 7), nn.Linear(7, 5)))["structure"]


MERGES = {
    "gptq": r"q.*\.weight: the backbone has no parameter of this name to merge into \(a quantizer may have packed it",
    "awq": r"q.*\.weight: the backbone has no parameter of this name to merge into \(a quantizer may have packed it",
    "bitsandbytes_8bit": r"q.*\.weight: expected a floating-point weight .* found torch.int8 .* as Int8Params; leave the",
    "bitsandbytes_4bit": r"q.*\.weight: expected a floating-point weight .* found torch.uint8 .* as Params4bit; leave the",
}


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_merging_into_quantized_weights_is_an_error(kind, architecture):
    model = quantized_backbone(kind, architecture)
    for method, message in ((dk.LoRA(r=2), MERGES[kind]), (dk.Adapter(size=3), "does not change weights")):
        delta = randomize(dk.attach(model, method))
        trained = run(model, architecture)
        with pytest.raises(dk.TargetError, match=message):
            delta.merge()
        assert torch.equal(run(model, architecture), trained)
        delta.detach()


@BOTH
def test_merging_into_quantized_weights_by_their_quantizer(architecture):
    model = quantized_backbone("bitsandbytes_4bit", architecture)
    bare = run(model, architecture)
    delta = randomize(dk.attach(model, dk.LoRA(r=2)), 0.3)
    trained = run(model, architecture)
    with pytest.warns(dk.DeltaWarning, match="quantized weights: rounding moved them by"):
        delta.merge(quantize=lambda linear: KINDS["bitsandbytes_4bit"](linear, torch.float32))
    merged = run(model, architecture)
    assert (merged - trained).norm() < 0.3 * (bare - trained).norm()
    assert torch.equal(run(delta.unmerge().backbone, architecture), trained)
    model = quantized_backbone("bitsandbytes_8bit", architecture)
    delta = randomize(dk.attach(model, dk.LoRA(r=2)), 0.3)
    with pytest.raises(dk.TargetError, match="Linear8bitLt does not compute with the weight that quantize= returned"):
        delta.merge(quantize=lambda linear: KINDS["bitsandbytes_8bit"](linear, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_beside_quantized_weights_is_merged_into(kind):
    model = quantized_backbone(kind, "bert")
    bare = run(model, "bert")
    delta = randomize(dk.attach(model, dk.BitFit()))
    trained = run(model, "bert")
    torch.testing.assert_close(run(delta.merge().backbone, "bert"), trained)
    delta.detach()
    assert torch.equal(run(model, "bert"), bare)


@pytest.mark.parametrize("kind", KINDS)
@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deltas_are_in_the_dtype_that_is_computed_in(kind, architecture, dtype):
    model = quantized_backbone(kind, architecture, dtype)
    delta = randomize(dk.attach(model, *METHODS, dk.Prefix(tokens=2)), 0.1)
    assert {parameter.dtype for parameter in delta.parameters()} == {dtype}
    out = run(model, architecture)
    assert out.dtype is dtype
    # A fixed direction: the squares of normalised states add up to a constant, whose gradient is rounding alone.
    (out.float() * torch.randn(out.shape)).sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in delta.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_training_quantized_weights_whole_is_an_error(kind):
    model = quantized_backbone(kind, "bert")
    before = snapshot(model)
    with pytest.raises(
        dk.StateError,
        match=r"train: encoder\.layer\.0\.intermediate\.dense is a \w+ with weights (in torch|packed in b)",
    ):
        dk.attach(model, dk.LoRA(r=2), train="@ff.up")
    same(before, snapshot(model))


class Weights(nn.Module):
    """A linear layer with nothing but a weight in few bits, and its options as attributes."""

    def __init__(self, dtype, **attributes):
        super().__init__()
        self.in_features, self.out_features = 7, 5
        self.weight = nn.Parameter(torch.randn(5, 7).to(dtype), requires_grad=False)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, torch.bfloat16),
        ({"compute_dtype": torch.float16}, torch.float16),
        ({"bias": nn.Parameter(torch.zeros(5, dtype=torch.float16))}, torch.float16),
        ({"scale": nn.Buffer(torch.ones(1, dtype=torch.float64))}, torch.float64),
        ({"scale": nn.Buffer(torch.ones(1, dtype=torch.float64), persistent=False)}, torch.bfloat16),
    ],
    ids=["around", "compute_dtype", "bias", "scale", "unsaved"],
)
def test_what_says_the_dtype_of_a_quantized_layer(dtype, attributes, expected):
    model = nn.ModuleDict({"block": nn.ModuleDict({"q": Weights(dtype, **attributes), "norm": nn.LayerNorm(3)})})
    model["block"]["norm"].to(torch.bfloat16)
    model["last"] = nn.Linear(2, 2)
    delta = dk.attach(model, dk.LoRA(r=2, at="q"))
    assert {parameter.dtype for parameter in delta.parameters()} == {expected}
    with pytest.raises(dk.TargetError, match=r"block\.q\.weight: expected a floating-point weight of shape \(5, 7\)"):
        delta.merge()
    delta.detach()
    with pytest.raises(
        dk.TargetError, match=r"block\.q\.weight: expected a parameter in floating point of at least 16"
    ):
        dk.attach(model, dk.LoRA(r=2, at="block.q.weight"))


def test_nothing_says_the_dtype():
    with pytest.raises(dk.TargetError, match=r"q: the weight of this Weights is torch.float8_e4m3fn and it has no"):
        dk.attach(nn.ModuleDict({"q": Weights(torch.float8_e4m3fn)}), dk.LoRA(r=2, at="q"))


def test_packing_loses_no_more_than_its_steps():
    linear = nn.Linear(11, 5)
    for packed in (kind(linear, torch.float32) for kind in (GPTQLike, AWQLike)):
        x = torch.randn(3, 11)
        step = packed.scales.max()
        assert packed.qweight.dtype is torch.int32
        assert (packed(x) - linear(x)).abs().max() <= step / 2 * x.abs().sum(-1).max() * 1.01


def test_three_of_the_tensors_that_differ_are_named():
    """Of eight quantized weights, with two values each."""
    one = {f"layers.{n}.weight": [1.0, -1.0] for n in range(8)}
    common = {"class": "Net", "structure": "s", "parameters": 8, "values": {}}
    other = {name: [-first, -second] for name, (first, second) in one.items()}
    (found,) = differences({**common, "rounded": one}, {**common, "rounded": other})
    assert found.endswith("in 8 tensors compared, such as layers.0.weight, layers.1.weight, layers.2.weight")
