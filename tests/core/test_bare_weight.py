"""The bare weight as matrices [*stack, out, in], however a module stores it and whatever else patches it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from deltakit.core import BareLayer, Target, WeightView, bare_weight, weight_view
from deltakit.core.feature_slice import FeatureSlice
from support.kind_methods import TurnedRows, registered
from support.models import randomize
from support.quantized_layers import KINDS

PLAIN = FeatureSlice("k", groups=1, stride=15, start=5, stop=10)
INTERLEAVED = FeatureSlice("k", groups=5, stride=3, start=1, stop=2)


class Stack(nn.Module):
    def __init__(self, *shape, transposed=False):
        super().__init__()
        self.is_transposed = transposed
        self.experts = nn.Parameter(torch.randn(shape))


def seen(module, **target):
    view = weight_view(Target("t", module, **target))
    return view, bare_weight(module, view)


class TestOrientation:
    def test_linear(self):
        layer = nn.Linear(5, 7)
        view, weight = seen(layer)
        assert torch.equal(weight, layer.weight)
        assert not weight.requires_grad
        assert torch.equal(view.stored(weight), layer.weight)

    def test_conv1d_and_embedding_are_stored_the_other_way_round(self):
        for layer, shape in ((Conv1D(7, 5), (7, 5)), (nn.Embedding(13, 5), (5, 13))):
            view, weight = seen(layer)
            assert weight.shape == shape
            assert torch.equal(weight, layer.weight.T)
            assert torch.equal(view.stored(weight), layer.weight)

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv1d(6, 10, 3, groups=2),
            nn.Conv2d(3, 7, (2, 5)),
            nn.Conv3d(6, 9, (1, 2, 3), groups=3),
            nn.Conv2d(4, 4, 3, groups=4),
        ],
        ids=str,
    )
    def test_convolutions(self, layer):
        view, weight = seen(layer)
        assert weight.ndim == 2
        assert weight.shape[0] == layer.out_channels
        # Row by row, a matrix of channels and places of the kernel in the order in which unfolding gives them.
        for row in (0, layer.out_channels - 1):
            assert torch.equal(weight[row], layer.weight[row].flatten())
        assert torch.equal(view.stored(weight), layer.weight)

    def test_a_convolution_as_a_matrix_times_unfolded_inputs(self):
        layer = nn.Conv2d(3, 7, (2, 5)).double()
        x = torch.randn(2, 3, 11, 13, dtype=torch.float64)
        _, weight = seen(layer)
        found = weight @ nn.functional.unfold(x, (2, 5)) + layer.bias[:, None]
        torch.testing.assert_close(found, layer(x).flatten(2))

    @pytest.mark.parametrize("transposed", [False, True])
    def test_stacks_of_experts(self, transposed):
        module = Stack(3, *((5, 7) if transposed else (7, 5)), transposed=transposed)
        view, weight = seen(module, parameter="experts")
        assert weight.shape == (3, 7, 5)
        assert torch.equal(weight[1], module.experts[1].T if transposed else module.experts[1])
        assert torch.equal(view.stored(weight), module.experts)

    def test_a_vector_stays_one(self):
        module = Stack(7, transposed=True)
        view, weight = seen(module, parameter="experts")
        assert torch.equal(weight, module.experts)
        assert torch.equal(view.stored(weight), module.experts)


class TestFeatureSlices:
    @pytest.mark.parametrize(
        ("part", "rows"), [(PLAIN, range(5, 10)), (INTERLEAVED, range(1, 15, 3))], ids=["plain", "interleaved"]
    )
    @pytest.mark.parametrize("layer", [nn.Linear(7, 15), Conv1D(15, 7)], ids=["linear", "conv1d"])
    def test_rows_of_the_weight_and_of_the_bias(self, layer, part, rows):
        view, weight = seen(layer, feature_slice=part)
        whole = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        rows = list(rows)
        assert torch.equal(weight, whole[rows])
        back = view.stored(weight)
        back = back.T if isinstance(layer, Conv1D) else back
        assert torch.equal(back[rows], whole[rows])
        assert not back[[i for i in range(15) if i not in rows]].any()
        assert torch.equal(BareLayer(layer, view).bias, layer.bias.detach()[rows])
        vector = WeightView("bias", feature_slice=part)
        assert torch.equal(bare_weight(layer, vector), layer.bias[rows])
        assert torch.equal(
            vector.stored(bare_weight(layer, vector)).nonzero().flatten(), torch.tensor(rows)[layer.bias[rows] != 0]
        )

    @pytest.mark.parametrize(
        ("part", "rows"), [(PLAIN, range(5, 10)), (INTERLEAVED, range(1, 15, 3))], ids=["plain", "interleaved"]
    )
    def test_of_a_parameter(self, part, rows):
        module = Stack(15, 7)
        view, weight = seen(module, parameter="experts", feature_slice=part)
        assert torch.equal(weight, module.experts[list(rows)])
        assert torch.equal(part.take(view.stored(weight).T).T, weight)


class TestQuantized:
    @pytest.mark.parametrize("kind", ["gptq", "awq"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_what_the_layer_computes_with(self, kind, bias):
        layer = KINDS[kind](nn.Linear(5, 7, bias=bias), torch.float32)
        view, weight = seen(layer)
        assert weight.shape == (7, 5)
        x = torch.randn(3, 5)
        torch.testing.assert_close(nn.functional.linear(x, weight, layer.bias), layer(x), rtol=1e-5, atol=1e-5)
        half, _ = seen(KINDS[kind](nn.Linear(5, 7), torch.bfloat16)), view
        assert half[1].dtype is torch.float32
        bare = BareLayer(layer, view).bias
        assert bare is None if not bias else torch.equal(bare, layer.bias)

    @pytest.mark.parametrize("kind", ["bitsandbytes_8bit", "bitsandbytes_4bit"])
    def test_of_bitsandbytes(self, kind):
        linear = nn.Linear(64, 32)
        layer = KINDS[kind](linear, torch.float32)
        _, weight = seen(layer)
        assert weight.shape == (32, 64)
        assert weight.dtype is torch.float32
        torch.testing.assert_close(weight, linear.weight.detach(), rtol=0, atol=0.04)
        assert not torch.equal(weight, linear.weight)

    def test_a_conv1d_whose_weight_is_of_another_class(self):
        """Quantizers have tensors of their own classes. The matrix that the layer computes with is not turned again."""

        class Packed(torch.Tensor):
            pass

        layer = Conv1D(5, 5)
        wanted = layer.weight.detach().T
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
        _, weight = seen(layer)
        torch.testing.assert_close(weight.as_subclass(torch.Tensor), wanted)


class TestRefused:
    @pytest.mark.parametrize("make", [lambda: nn.Linear(5, 7), lambda: Conv1D(7, 5), lambda: nn.Embedding(13, 5)])
    def test_a_weight_on_the_meta_device(self, make):
        with torch.device("meta"):
            layer = make()
        with pytest.raises(
            dk.StateError,
            match=r"weight of a \w+ has no values here \(meta device or offload\); load it into memory, or leave",
        ):
            seen(layer)

    def test_a_quantized_layer_on_the_meta_device(self):
        layer = KINDS["gptq"](nn.Linear(5, 7), torch.float32).to("meta")
        with pytest.raises(dk.StateError, match="weight of a GPTQLike has no values here"):
            seen(layer)

    def test_a_module_without_it(self):
        with pytest.raises(
            dk.TargetError, match="a ReLU has no parameter 'weight'; leave this target out with exclude="
        ):
            seen(nn.ReLU())

    def test_a_delta_that_reads_a_meta_weight(self):
        with registered(TurnedRows):
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(5, 7))
            dk.attach(model, TurnedRows(at="0"))
            with pytest.raises(dk.StateError, match="weight of a Linear has no values here"):
                model(torch.randn(3, 5, device="meta"))


class Reads(nn.Module):
    """Reads the weight of a layer that it never calls; `noted` sees what the weight is then."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(5, 7)
        self.noted = []

    def forward(self, x):
        view = weight_view(Target("proj", self.proj))
        self.noted.append((self.proj.weight, bare_weight(self.proj, view)))
        return nn.functional.linear(x, self.proj.weight, self.proj.bias)


class TestOtherDeltas:
    def test_a_patch_that_is_active_is_not_in_it(self):
        model = nn.Sequential(Reads()).double()
        own = model[0].proj.weight
        randomize(dk.attach(model, dk.LoRA(r=3, at="0.proj.weight")))
        model(torch.randn(3, 5, dtype=torch.float64))
        (patched, bare), *_ = model[0].noted
        assert not torch.allclose(patched, own)
        assert torch.equal(bare, own)
        assert bare.data_ptr() == own.data_ptr()

    def test_a_second_delta_computes_its_update_from_the_backbone_s_own(self):
        with registered(TurnedRows):
            model = nn.Sequential(nn.Embedding(13, 5)).double()
            own = model[0].weight.detach().clone()
            randomize(dk.attach(model, dk.LoRA(r=3, at="0.weight"), name="lora"))
            turned = randomize(dk.attach(model, TurnedRows(at="0"), name="turned"))
            (module,), noted = turned.modules["0"], []
            plain = module.new_weight
            module.new_weight = lambda weight: (noted.append(weight), plain(weight))[1]
            model(torch.tensor([1, 3]))
        assert noted
        assert all(torch.equal(weight, own.T) for weight in noted)


def test_only_the_weight_itself_must_be_in_memory():
    layer = nn.Linear(3, 5)
    layer.bias = nn.Parameter(layer.bias.to("meta"))
    assert torch.equal(bare_weight(layer, WeightView()), layer.weight)
