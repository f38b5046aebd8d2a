"""GLoRA against the paper's formula in float64 and against PEFT; biases, slices, weights that are read, and bad options."""

import itertools

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit import GLoRA
from support.models import Transformer, attached
from support.peft_layers import CLOSE, alike, conv1d, linear, with_peft

OF_BIAS = (("lora", "vector", "none"), ("vector", "constant", "none"))
FORMS = list(itertools.product(("lora", "vector", "constant", "none"), *OF_BIAS))[:-1]
FEW = [("lora", "lora", "constant"), ("vector", "vector", "vector"), ("none", "none", "vector")]
"""Each form of each part, once."""


def without_bias(d_in, d_out):
    layer = linear(d_in, d_out)
    layer.bias = None
    return layer


def by_hand(weight, bias, module):
    """The paper's new weight and bias."""
    p = dict(module.named_parameters())

    def part(name, *shape):
        if f"{name}_up" in p:
            return torch.einsum("or,ri->oi", p[f"{name}_up"], p[f"{name}_down"]).view(shape)
        return p[name].broadcast_to(shape) if name in p else torch.zeros(shape, dtype=weight.dtype)

    new = weight + weight * part("A", *weight.shape) + part("B", *weight.shape)
    if bias is None:
        return new, None
    through = torch.einsum("oi,ik->o", weight, part("C", weight.shape[1], 1))
    return new, bias + bias * part("D", *bias.shape) + part("E", *bias.shape) + through


@pytest.mark.parametrize(
    ("make", "ab", "c", "de"),
    [*((linear, *forms) for forms in FORMS), *((conv1d, *forms) for forms in FEW), (without_bias, *FEW[0])],
)
@torch.no_grad()
def test_it_is_its_formula(make, ab, c, de):
    layer, x = make(11, 7), torch.randn(2, 5, 11, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    bare = model(x)
    delta = attached(model, GLoRA(at="0", r=3, ab=ab, c=c, de=de))
    matrix = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    weight, bias = by_hand(matrix, layer.bias, delta.modules["0"][0])
    expected = torch.nn.functional.linear(x, weight, bias)
    assert not torch.allclose(model(x), bare)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)
    assert torch.equal(delta.unmerge().detach().backbone(x), bare)


@pytest.mark.parametrize(("ab", "c", "de"), [*FEW, ("constant", "none", "none")])
def test_pefts_outputs_gradients_and_weights(ab, c, de):
    peft = pytest.importorskip("peft")
    layer, x = linear(11, 7), torch.randn(2, 5, 11, dtype=torch.float64)
    config = peft.GloraConfig(target_modules=["0"], r=3, config_A_B=ab, config_C=c, config_D_E=de)
    theirs, _ = with_peft(layer, config)
    own = {n.split("glora_")[1].replace(".default.", " "): p for n, p in theirs.named_parameters() if "glora_" in n}
    for parameter in own.values():
        parameter.data = parameter.data.double() + torch.randn(parameter.shape, dtype=torch.float64)
    ours = {name.replace(" Xd", "_up").replace(" Xu", "_down").replace(" X", ""): p for name, p in own.items()}
    # One number for a whole matrix is a vector in PEFT.
    given = {name: p.reshape(1, 1) if name in "AB" and ab == "constant" else p for name, p in ours.items()}
    delta = alike(layer, GLoRA(at="0", r=3, ab=ab, c=c, de=de), given, theirs, x)
    found = {name.rpartition(".")[2]: parameter.grad for name, parameter in delta.named_parameters()}
    assert found.keys() == ours.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(found[name].view_as(parameter), parameter.grad, **CLOSE)


def test_forms_that_differ_between_targets():
    model = Transformer()
    delta = attached(model, GLoRA(at="q_proj", r=2, ab={"layers.1": "vector", "*": "lora"}, c="none"))
    shapes = [{name: tuple(p.shape) for name, p in modules[0].named_parameters()} for modules in delta.modules.values()]
    assert shapes[0]["A_up"] == (20, 2)
    assert shapes[1]["A"] == (20, 1)
    assert {"C", "C_up"}.isdisjoint(shapes[0])


@torch.no_grad()
def test_a_bias_that_is_read_directly_changes_too():
    """`nn.MultiheadAttention` never calls its output projection."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    nn.init.normal_(attention.out_proj.bias)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    model = nn.ModuleDict({"attention": attention})
    delta = attached(model, GLoRA(at="out_proj", r=3, de="vector"))
    found, layer = attention(x, x, x)[0], attention.out_proj
    weight, bias = by_hand(layer.weight, layer.bias, delta.modules["attention.out_proj"][0])
    delta.detach()
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    torch.testing.assert_close(found, attention(x, x, x)[0], **CLOSE)


def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward_pass():
    layer = linear(101, 97)
    weights, model = {id(layer.weight), layer.weight.data_ptr()}, nn.Sequential(layer)
    attached(model, GLoRA(at="0", r=3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 101, dtype=torch.float64, requires_grad=True))
    assert [t for t in kept if t.data_ptr() in weights]
    assert max(t.numel() for t in kept if t.data_ptr() not in weights) < 97 * 101


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"GLoRA\(r=0\): expected a rank of at least 1; 8 is usual"),
        ({"ab": "full"}, r"GLoRA\(ab='full'\): expected .*'lora', 'vector', 'constant'"),
        ({"c": "constant"}, r"GLoRA\(c='constant'\): expected .*'lora', 'vector' or 'none'"),
        ({"de": "lora"}, r"GLoRA\(de='lora'\): expected .*'vector', 'constant' or 'none'"),
        ({"ab": "none", "c": "none", "de": "none"}, "nothing is left to train; ab='lora' is usual"),
    ],
)
def test_bad_options(unchecked, options, message):
    with pytest.raises(dk.OptionError, match=message):
        GLoRA(**options)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Linear(5, 7), {"r": 6}, r"^0: rank 6 is above the layer's size 5 to 7; use GLoRA\(r=5\) or less"),
        (
            nn.Linear(5, 7, bias=False),
            {"ab": "none"},
            r"^0: it has no bias, and GLoRA\(ab='none'\) changes nothing else; use",
        ),
        (nn.LayerNorm(5), {"r": 2}, "^0: GLoRA works on Linear, Conv1D"),
    ],
)
def test_targets_that_cannot_have_it(layer, options, message):
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(nn.Sequential(layer), GLoRA(at="0", **options))
