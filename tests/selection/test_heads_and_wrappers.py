"""The head of a backbone, and roles inside wrappers and under PEFT's wrapped layers."""

import copy
from collections import OrderedDict

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.backbone_inputs import hidden, inputs
from support.models import randomize
from support.tiny_transformers import build

# PEFT asks transformers by an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"),
]


class Net(nn.Module):
    """A trunk and a head by the name that a library gives it."""

    def __init__(self, name, head):
        super().__init__()
        self.trunk = nn.Conv2d(3, 7, 3)
        self.add_module(name, head)


class Timm(Net):
    """timm's models name their classifier, and it may be inside of a module with a norm."""

    def get_classifier(self):
        return self.head.fc


class Packed(nn.Module):
    """A quantized layer, whose weights are buffers."""

    in_features, out_features, compute_dtype = 5, 2, torch.float32

    def __init__(self):
        super().__init__()
        self.register_buffer("packed", torch.zeros(2, 5, dtype=torch.int8))


class Shared(nn.Sequential):
    """It has its own forward, so its last child need not compute its output."""

    def forward(self, x):
        return self[0](self[1](x))


def pooled():
    return nn.ModuleDict({"norm": nn.LayerNorm(7), "fc": nn.Linear(7, 2)})


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda: Net("heads", nn.Sequential(OrderedDict(head=nn.Linear(7, 2)))), ["heads.head"]),
        (lambda: Net("fc", nn.Linear(7, 2)), ["fc"]),
        (lambda: Net("classifier", nn.Sequential(nn.Dropout(), nn.Linear(7, 2))), ["classifier.1"]),
        (lambda: Net("classifier", nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))), ["classifier.2"]),
        (lambda: Net("classifier", nn.Sequential(nn.Conv2d(7, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))), ["classifier.2"]),
        (lambda: Net("classifier", nn.Sequential(nn.LayerNorm(7), nn.Flatten(), nn.Linear(7, 2))), ["classifier.2"]),
        (lambda: Net("head", nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))), ["head"]),
        (lambda: Net("head", Shared(nn.Linear(7, 7), nn.Linear(7, 7))), ["head"]),
        (lambda: Timm("head", pooled()), ["head.fc"]),
        (lambda: Net("head", pooled()), ["head"]),
        (lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)), ["2"]),
        (lambda: nn.Sequential(build("bert"), nn.Sequential(nn.Dropout(), nn.Linear(24, 2))), ["1.1"]),
        (lambda: nn.Sequential(build("bert"), nn.Sequential(nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 2))), ["1.2"]),
        (lambda: build("roberta", tf.AutoModelForSequenceClassification), ["classifier"]),
    ],
    ids=[
        "torchvision ViT",
        "ResNet",
        "EfficientNet",
        "VGG",
        "convolutions",
        "ConvNeXt",
        "a norm at the end",
        "its own forward",
        "timm",
        "a head with a norm",
        "Sequential",
        "nested",
        "nested VGG",
        "RoBERTa",
    ],
)
def test_head(make, head):
    model = make()
    assert list(dk.select(model, "@head")) == head
    assert dk.attach(model, dk.BitFit(), train="@head").num_parameters > 0


def test_the_last_layer_of_a_head_may_be_quantized():
    model = Net("head", nn.Sequential(nn.Linear(7, 5), nn.ReLU(), Packed()))
    assert list(dk.select(model, "@head")) == ["head.2"]


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Sequential(nn.Linear(7, 5)), lambda: build("bert"), lambda: nn.TransformerEncoderLayer(12, 2, 5)],
)
def test_no_head(make):
    with pytest.raises(dk.SelectorError, match="'@head' matches none"):
        dk.select(make(), "@head")


class Wrapper(nn.Module):
    """A LightningModule holds its model as an attribute."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


MODELS = {
    "bert": tf.AutoModelForSequenceClassification,
    "gpt2": tf.AutoModelForCausalLM,
    "t5": tf.AutoModelForSeq2SeqLM,
    "llama": tf.AutoModelForCausalLM,
    "bloom": tf.AutoModelForCausalLM,
}
WRAPPERS = {
    "one": (Wrapper, "model."),
    "two": (lambda model: Wrapper(Wrapper(model)), "model.model."),
    "PEFT": (lambda m: peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules="all-linear")), "base_model.model."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", MODELS)
def test_roles_inside_wrappers_are_those_of_the_model(kind, wrapper):
    wrap, prefix = WRAPPERS[wrapper]
    bare = dk.roles(build(kind, MODELS[kind]))
    roles = dk.roles(wrap(build(kind, MODELS[kind])))
    plain = {role: [path.replace(".base_layer", "") for path in paths] for role, paths in roles.items()}
    assert plain == {role: [prefix + path for path in paths] for role, paths in bare.items()}
    if wrapper == "PEFT":
        assert all(".base_layer" in path for path in roles["@attn.q"])


@pytest.mark.parametrize("method", [dk.LoRA(r=2), dk.SoftPrompt(tokens=3), dk.Prefix(tokens=2)], ids=lambda m: m.name)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_a_delta_inside_a_wrapper_computes_what_it_does_without(kind, wrapper, method):
    # PEFT's own LoRA on the head counts as a new head, so `train=()` says that it stays frozen.
    model = build(kind, MODELS[kind]).requires_grad_(False)
    wrapped, batch = WRAPPERS[wrapper][0](copy.deepcopy(model)).eval(), inputs(kind, model)
    delta, inside = randomize(dk.attach(model, method)), dk.attach(wrapped, method, train=())
    for parameter, other in zip(delta.parameters(), inside.parameters(), strict=True):
        other.data.copy_(parameter.data)
    torch.testing.assert_close(result(wrapped(**batch)), result(model(**batch)))


def result(output):
    return output.logits if hasattr(output, "logits") else hidden(output)


def test_a_selected_wrapper_of_peft_means_the_layer_in_it():
    model = WRAPPERS["PEFT"][0](build("gpt2"))
    inside = [f"base_model.model.h.{i}.attn.c_attn.base_layer" for i in (0, 1)]
    assert dk.plan(model, dk.LoRA(r=2, at="c_attn")).paths["lora"] == inside
    assert len(dk.plan(model, dk.LoRA(r=2, at="attn")).paths["lora"]) == 4


def test_a_soft_prompt_under_an_embedding_that_peft_wraps_is_an_error():
    model = peft.get_peft_model(build("gpt2"), peft.LoraConfig(r=2, target_modules=["wte"]))
    with pytest.raises(dk.TargetError, match=r"wte\.base_layer: PEFT's Embedding around .* merge_and_unload\(\)"):
        dk.plan(model, dk.SoftPrompt(tokens=2))
    assert dk.plan(model.merge_and_unload(), dk.SoftPrompt(tokens=2)).num_parameters
