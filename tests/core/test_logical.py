"""Parameters as the model defines them, however they are stored."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltakit.core import logical_parameters, named_logical_parameters, num_parameters, own_parameters
from support.quantized_layers import KINDS
from support.tiny_transformers import build


class Packed(nn.Module):
    """A linear layer from 13 to 11 features with tensors of any format: buffers, but parameters where the name says so."""

    def __init__(self, **tensors):
        super().__init__()
        self.in_features, self.out_features = 13, 11
        for name, tensor in tensors.items():
            if name.startswith("parameter_"):
                parameter = nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(name.removeprefix("parameter_"), parameter)
            else:
                self.register_buffer(name, tensor)


def shapes(module):
    return {name: shape and tuple(shape) for name, shape, _ in logical_parameters(module)}


def ints(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


FORMATS = {
    "gptq": {"qweight": ints(2, 11), "qzeros": ints(1, 2), "scales": torch.ones(1, 11), "g_idx": ints(13)},
    "awq": {"qweight": ints(13, 2), "qzeros": ints(1, 2), "scales": torch.ones(1, 11)},
    "hqq": {"parameter_W_q": ints(72, 1, dtype=torch.uint8)},
    "compressed-tensors": {
        "parameter_weight_packed": ints(11, 2),
        "parameter_weight_scale": torch.ones(11, 1),
        "parameter_weight_shape": torch.tensor([11, 13]),
    },
    "float8": {
        "parameter_weight": torch.zeros(11, 13).to(torch.float8_e4m3fn),
        "parameter_weight_scale_inv": torch.ones(1, 1),
    },
    "int8": {"weight": ints(11, 13, dtype=torch.int8), "weight_scales": torch.ones(11)},
    "transposed": {"parameter_weight": ints(13, 11, dtype=torch.int8), "parameter_scale": torch.ones(1)},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_packed_formats_have_the_shape_of_the_layer(kind, bias):
    layer = Packed(**FORMATS[kind], **({"bias": torch.zeros(11)} if bias else {}))
    assert shapes(layer) == {"weight": (11, 13)} | ({"bias": (11,)} if bias else {})
    assert num_parameters(nn.Sequential(layer, layer)) == 143 + 11 * bias


@pytest.mark.parametrize("kind", KINDS)
def test_quantizers_have_the_names_and_shapes_of_the_layer(kind):
    linear = nn.Linear(24, 52)
    expected = shapes(linear)
    assert expected == {"weight": (52, 24), "bias": (52,)}
    assert shapes(KINDS[kind](linear, torch.float32)) == expected


def test_torchao_s_tensors_say_their_shape():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    expected = [shapes(layer) for layer in model]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert [shapes(layer) for layer in model] == expected


def test_an_embedding_in_4_bits():
    layers = pytest.importorskip("bitsandbytes").nn
    assert shapes(layers.Embedding4bit(128, 64).to("cpu")) == {"weight": (128, 64)}


def test_experts_in_float8_without_their_scales():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(3, 5, 7).to(torch.float8_e4m3fn), requires_grad=False)
            self.down_proj_scale_inv = nn.Parameter(torch.ones(3, 1, 1))
            self.down_proj_bias = nn.Parameter(torch.ones(3, 5))

    assert shapes(Experts()) == {"down_proj": (3, 5, 7), "down_proj_bias": (3, 5)}


def test_what_is_not_quantized_stays_as_it_is():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(5, 7)
            self.weight_scale = nn.Parameter(torch.ones(7))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    class Sized(nn.Module):
        """It has sizes and a counter, and its weight is elsewhere."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 5, 7
            self.inner = nn.Linear(5, 7)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    assert shapes(Scaled()) == {"weight": (7, 5), "bias": (7,), "weight_scale": (7,)}
    assert shapes(Sized()) == {}
    assert num_parameters(Sized()) == 42
    assert shapes(Conv1D(7, 5)) == {"weight": (5, 7), "bias": (7,)}
    assert shapes(nn.LazyLinear(7)) == {"weight": None, "bias": None}
    assert num_parameters(nn.LazyLinear(7)) == 0
    sharded = nn.Linear(5, 7)
    sharded.weight.data = torch.zeros(0)
    sharded.weight.ds_shape = (7, 5)
    assert shapes(sharded) == {"weight": (7, 5), "bias": (7,)}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "llama", "mixtral", "clip"])
def test_of_models_in_full_precision_they_are_the_parameters(kind):
    model = build(kind)
    found = {name: parameter.stored for name, parameter in named_logical_parameters(model)}
    assert list(found) == [name for name, _ in own_parameters(model)]
    assert all(found[name] is parameter for name, parameter in own_parameters(model))
    assert num_parameters(model) == sum(parameter.numel() for parameter in model.parameters())
