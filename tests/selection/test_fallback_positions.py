"""Default positions where the backbone has no attention: the layers in its blocks, or the outputs of its blocks."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.selection import output_features
from support.models import randomize


class ConvNorm(nn.Sequential):
    """A convolution and a norm, as torchvision's networks have them in lists inside of a block."""

    def __init__(self, d_in, d_out, kernel, stride=1):
        super().__init__(nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(d_out))


class InvertedResidual(nn.Module):
    def __init__(self, d_in, d_out, stride=1):
        super().__init__()
        self.block = nn.Sequential(ConvNorm(d_in, 11, 1), ConvNorm(11, 11, 3, stride), ConvNorm(11, d_out, 1))
        self.short = d_in == d_out

    def forward(self, x):
        y = self.block(x)
        if self.short:
            y += x
        return y


class Efficient(nn.Module):
    """The names and the structure of torchvision's EfficientNet and MobileNet."""

    def __init__(self):
        super().__init__()
        stage = nn.Sequential(InvertedResidual(7, 13, 2), InvertedResidual(13, 13))
        self.features = nn.Sequential(ConvNorm(3, 7, 3, 2), stage, ConvNorm(13, 17, 1))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(17, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class ChannelsLastBlock(nn.Module):
    """ConvNeXt's block: it computes on channels last, between two convolutions on channels first."""

    def __init__(self):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(7, 7, 3, padding=1, groups=7), nn.LayerNorm(7)
        self.mixer, self.out = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.out(torch.relu(self.mixer(y))).permute(0, 3, 1, 2)


class Dense(nn.Module):
    """DenseNet's blocks take a list of all earlier features."""

    class Layer(nn.Module):
        def __init__(self, d_in):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(d_in), nn.Conv2d(d_in, 5, 3, padding=1)

        def forward(self, x):
            return self.conv(self.norm(x if isinstance(x, torch.Tensor) else torch.cat(x, 1)))

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({f"denselayer{i}": Dense.Layer(3 + 5 * i) for i in range(2)})
        self.classifier = nn.Linear(5, 2)

    def forward(self, x):
        features = [x]
        for layer in self.layers.values():
            features.append(layer(features))
        return self.classifier(features[-1].mean((2, 3)))


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 23), nn.Linear(23, 19), nn.Linear(19, 5)

    def forward(self, x):
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Vgg(nn.Module):
    """torchvision's VGG and AlexNet: a classifier of several layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 5, 3))
        self.classifier = nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Dropout(), nn.Linear(11, 4))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(7, 11, 3, padding=1), nn.Conv2d(11, 7, 1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.conv1(x)))


class Unlisted(nn.Module):
    """timm's RegNet holds its blocks as attributes."""

    def __init__(self):
        super().__init__()
        self.b1, self.b2, self.head = Residual(), Residual(), nn.Linear(7, 2)

    def forward(self, x):
        return self.head(self.b2(self.b1(x)).mean((2, 3)))


def resnet():
    config = tf.ResNetConfig(embedding_size=6, hidden_sizes=[10, 14], depths=[1, 2], layer_type="basic")
    return tf.ResNetForImageClassification(config)


IMAGES, VECTORS = (2, 3, 19, 23), (3, 12)
CONVOLUTIONS = [f"features.1.{i}.block.{j}.0" for i in (0, 1) for j in (0, 1, 2)]
BLOCKS = ["resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.1.layers.0", "resnet.encoder.stages.1.layers.1"]
RESNET = [
    *(f"{BLOCKS[0]}.{name}" for name in ("shortcut", "layer.0", "layer.1")),
    *(f"{BLOCKS[1]}.{name}" for name in ("shortcut", "layer.0", "layer.1")),
    *(f"{BLOCKS[2]}.{name}" for name in ("layer.0", "layer.1")),
]
MODELS = {
    "ResNet": (resnet, IMAGES, [f"{path}.convolution" for path in RESNET], BLOCKS),
    "EfficientNet": (Efficient, IMAGES, CONVOLUTIONS, ["features.1.0", "features.1.1"]),
    "DenseNet": (
        Dense,
        IMAGES,
        [f"layers.denselayer{i}.conv" for i in (0, 1)],
        [f"layers.denselayer{i}" for i in (0, 1)],
    ),
    "Unlisted": (
        Unlisted,
        (2, 7, 19, 23),
        [f"b{i}.{name}" for i in (1, 2) for name in ("conv1", "conv2")],
        ["b1", "b2"],
    ),
    "VGG": (
        Vgg,
        IMAGES,
        ["features.0", "features.2", "classifier.0"],
        ["features.0", "features.2", "classifier.0"],
    ),
    "MLP": (Perceptron, VECTORS, ["fc1", "fc2"], ["fc1", "fc2"]),
    "Sequential": (
        lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)),
        VECTORS,
        ["0"],
        ["0"],
    ),
}


def output(model, x):
    result = model(x)
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [dk.LoRA(r=2), dk.IA3(), dk.Adapter(size=2), dk.BitFit()], ids=lambda m: m.name)
def test_every_method_has_default_positions_that_work(name, method):
    make, shape, layers, blocks = MODELS[name]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    x = torch.randn(shape)
    bare = output(model, x)
    delta = dk.attach(model, method)
    if method.name != "bitfit":
        assert sorted(delta.modules) == sorted(blocks if method.name == "adapter" else layers)
        assert "(fallback: " in repr(delta)
        assert "choose others with at=)" in repr(dk.plan(make(), method))
    assert torch.equal(output(model, x), bare)
    randomize(delta)
    changed = output(model, x)
    assert not torch.allclose(changed, bare)
    changed.square().sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    delta.detach()
    assert torch.equal(output(model, x), bare)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (Vgg, "its layers without the head"),
        (Perceptron, "its layers without the last"),
        (lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)), "its layers without the head"),
        (Unlisted, "the layers in its blocks"),
        (
            lambda: nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(3))),
            "the layers in its blocks without the head",
        ),
    ],
)
def test_the_note_says_which_layers_these_are(make, what):
    planned = dk.plan(make(), dk.LoRA(r=2))
    assert f", so these are {what}; choose others" in repr(planned)
    layers = [path for path, module in make().named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert len(planned.paths["lora"]) == len(layers) - ("without" in what or make is Unlisted)


def test_an_adapter_behind_a_block_works_on_its_channels():
    torch.manual_seed(0)
    model = nn.Sequential(ChannelsLastBlock(), ChannelsLastBlock()).eval()
    delta = randomize(dk.attach(model, dk.Adapter(size=2, at="0", activation="tanh")))
    (adapter,) = delta.modules["0"]
    x = torch.randn(2, 7, 7, 7)
    with delta.detached():
        y = model[0](x)
    features = y.movedim(1, -1)
    update = adapter.up(torch.tanh(adapter.down(features)))
    torch.testing.assert_close(model(x), model[1]((features + update).movedim(-1, 1)))


@pytest.mark.parametrize(
    ("block", "features"),
    [
        (lambda: ChannelsLastBlock(), (-3, 7)),
        (lambda: InvertedResidual(7, 13, 2), (-3, 13)),
        (lambda: nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5)), (-1, 5)),
        (lambda: nn.Sequential(nn.Conv1d(7, 11, 3)), (-2, 11)),
        (lambda: nn.Sequential(nn.Conv3d(2, 3, 3)), (-4, 3)),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten()), None),
        (lambda: nn.Sequential(nn.ReLU()), None),
    ],
)
def test_the_features_of_a_block_s_output(block, features):
    assert output_features(block()) == features


def test_layers_that_an_option_does_not_fit_are_left_out_and_shown():
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 3), nn.Linear(3, 20), nn.Linear(20, 5))
    planned = dk.plan(model, dk.LoRA(r=5))
    assert planned.paths["lora"] == ["0"]
    assert "      {1-2}  left out: an option does not fit its size" in repr(planned)


def test_looking_for_defaults_draws_no_random_numbers():
    model, state = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)), torch.random.get_rng_state()
    with pytest.raises(dk.OptionError, match="0: rank 6 is above the layer's size 7 to 5"):
        dk.plan(model, dk.LoRA(r=6))
    assert torch.equal(torch.random.get_rng_state(), state)


class OpaqueAttention(nn.Module):
    """Its forward does not show which features of `qkv` are queries."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x, secret):
        return self.proj(secret.split(self.qkv(x)))


def test_a_layout_that_cannot_be_measured_is_shown():
    model = nn.ModuleDict({"attn": OpaqueAttention()})
    told = (
        "(the full projection attn.qkv: its forward does not show which of its features are queries, keys and values)"
    )
    assert told in repr(dk.plan(model, dk.LoRA(r=2)))
    assert told in repr(dk.attach(model, dk.LoRA(r=2)))
    assert told not in repr(dk.plan(model, dk.BitFit()))
    block = nn.ModuleDict({"attn": OpaqueAttention(), "up": nn.Linear(12, 20), "down": nn.Linear(20, 12)})
    assert "attn.qkv  left out: its forward does not show" in repr(dk.plan(block, dk.IA3()))


def test_a_processor_may_compute_the_attention():
    """As in diffusers, whose `fuse_projections` reads weights that its processors call."""

    class Processor:
        def __call__(self, attn, x):
            def split(y):
                return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

            y = nn.functional.scaled_dot_product_attention(*map(split, (attn.to_q(x), attn.to_k(x), attn.to_v(x))))
            return attn.to_out[0](y.transpose(1, 2).flatten(2))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.processor = 3, Processor()
            self.to_q, self.to_k, self.to_v = (nn.Linear(12, 12) for _ in range(3))
            self.to_out = nn.ModuleList([nn.Linear(12, 12), nn.Dropout(0.0)])

        def fuse_projections(self):
            return torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])

        def forward(self, x):
            return self.processor(self, x)

    model, x = nn.ModuleDict({"attn1": Attention()}), torch.randn(2, 5, 12)
    assert dk.plan(model, dk.IA3()).paths["ia3"] == ["attn1.to_k", "attn1.to_v"]
    bare = model["attn1"](x)
    delta = dk.attach(model, dk.Prefix(tokens=2))
    assert list(delta.modules) == ["attn1"]
    assert not torch.allclose(model["attn1"](x), bare)
