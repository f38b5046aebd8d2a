"""A selector that names a container: the layers in it, for methods whose default positions are layers."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import Transformer, randomize
from support.tiny_transformers import build

BERT_ATTENTION = [
    f"encoder.layer.{layer}.attention.{part}"
    for layer in (0, 1)
    for part in ("self.query", "self.key", "self.value", "output.dense")
]


def paths(model, method):
    return next(iter(dk.plan(model, method).paths.values()))


def test_a_container_means_the_layers_in_it():
    model = build("bert")
    norms = [f"encoder.layer.{layer}.attention.output.LayerNorm" for layer in (0, 1)]
    assert sorted(paths(model, dk.LoRA(r=2, at="attention"))) == sorted(BERT_ATTENTION)
    assert sorted(paths(model, dk.IA3(at="attention"))) == sorted(BERT_ATTENTION)
    assert sorted(paths(model, dk.BitFit(at="attention"))) == sorted(BERT_ATTENTION + norms)
    assert paths(model, dk.Adapter(size=2, at="attention")) == [f"encoder.layer.{i}.attention" for i in (0, 1)]
    assert paths(model, dk.Prefix(tokens=2, at="encoder")) == [f"encoder.layer.{i}.attention.self" for i in (0, 1)]


def test_bitfit_in_a_container_has_the_biases_that_opendelta_trains():
    """One new bias on the container's output was 768 parameters instead of 3,840."""
    config = tf.BertConfig(vocab_size=97, num_hidden_layers=1, hidden_size=768, intermediate_size=52)
    with torch.device("meta"):
        model = tf.BertModel(config)
    assert dk.plan(model, dk.BitFit(at="attention")).num_parameters == 3840


def test_the_plan_prints_what_was_chosen():
    text = repr(dk.plan(build("bert"), dk.LoRA(r=2, at="attention")))
    assert "      encoder.layer.{0-1}.attention.self.{query,key,value}\n" in text
    assert "      encoder.layer.{0-1}.attention.output.dense\n" in text


def test_roles_of_containers_and_opendelta_names():
    model = build("llama")
    layers = [f"layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")]
    assert paths(model, dk.LoRA(r=2, at="@ff")) == paths(model, dk.LoRA(r=2, at="ff@")) == layers
    assert len(paths(model, dk.LoRA(r=2, at="@block"))) == 14
    assert len(paths(model, dk.BitFit(at="@block"))) == 18


def test_embeddings_are_selected_by_their_own_name_only():
    model = build("gpt2")
    inside = paths(model, dk.LoRA(r=2, at="^"))
    assert inside == [f"h.{i}.{p}" for i in (0, 1) for p in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert paths(model, dk.LoRA(r=2, at="wpe")) == ["wpe"]


def test_overlapping_selectors_attach_once_and_exclude_reaches_inside():
    model = build("bert")
    method = dk.LoRA(r=2, at=["layer.0", "layer.0.attention", "query"], exclude=["layer.0.attention.self", "layer.1"])
    assert paths(model, method) == [
        f"encoder.layer.0.{p}.dense" for p in ("attention.output", "intermediate", "output")
    ]


def test_of_names_the_layers_or_the_containers():
    model = build("bert")
    assert sorted(paths(model, dk.LoRA(r=2, at="**", of="BertAttention"))) == sorted(BERT_ATTENTION)
    assert sorted(paths(model, dk.BitFit(at="attention", of=nn.Linear))) == sorted(BERT_ATTENTION)
    assert len(paths(model, dk.LoRA(r=2, at="**", of=nn.Linear))) == 13
    with pytest.raises(dk.SelectorError, match="of=.*Conv2d.* leaves none"):
        dk.plan(model, dk.LoRA(r=2, at="attention", of=nn.Conv2d))


def test_a_module_with_its_own_forward_and_a_weight_is_a_layer():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(super().forward(x))

    model = nn.ModuleDict({"part": nn.ModuleDict({"scaled": Scaled()})})
    assert paths(model, dk.LoRA(r=2, at="part")) == paths(model, dk.LoRA(r=2, at="scaled")) == ["part.scaled"]


def test_torch_attention_is_a_container_of_its_projections():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 1)
    inside = [*(f"layers.0.self_attn.in_proj_weight[{letter}]" for letter in "qkv"), "layers.0.self_attn.out_proj"]
    assert sorted(paths(model, dk.LoRA(r=2, at="self_attn"))) == sorted(inside)
    planned = dk.plan(model, dk.BitFit(at="self_attn"))
    assert sorted(planned.paths["bitfit"]) == sorted(inside)
    assert planned.num_parameters == 4 * 12
    with pytest.raises(
        dk.TargetError,
        match=r"layers\.0\.self_attn: ia3 is attached to layers, .* MultiheadAttention has no linear layer .*read directly",
    ):
        dk.plan(model, dk.IA3(at="self_attn"))
    planned = dk.plan(model, dk.IA3(at="layers.0"))
    assert planned.paths["ia3"] == ["layers.0.linear1", "layers.0.linear2"]
    assert "in_proj_weight[v],out_proj}  left out: weight read directly" in repr(planned)


def test_experts_are_containers_of_their_stacks():
    model = build("mixtral")
    stacks = [f"layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]
    assert paths(model, dk.LoRA(r=2, at="experts")) == stacks
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="@ff")))
    assert set(stacks) <= delta.modules.keys()
    model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())


@pytest.mark.parametrize(
    ("container", "method"),
    [(nn.Sequential(nn.ReLU(), nn.Dropout()), dk.LoRA()), (nn.Sequential(nn.LayerNorm(7)), dk.LoRA())],
    ids=["no layer", "no layer for this method"],
)
def test_a_container_without_layers_is_an_error_whose_advice_works(container, method):
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 13)), "b": container})
    with pytest.raises(
        dk.TargetError,
        match=r"b: lora is attached to layers, and this Sequential has no linear layer or convolution in it",
    ):
        dk.plan(model, dk.LoRA(r=2, at=["a", "b"]))
    assert paths(model, dk.LoRA(r=2, at=["a", "b"], exclude="b")) == ["a.0", "a.1"]


def test_an_option_that_does_not_fit_a_layer_in_a_container_is_an_error_whose_advice_works():
    model = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 3))
    with pytest.raises(dk.OptionError, match=r"1: rank 5 is above .* leave it out with exclude="):
        dk.plan(model, dk.LoRA(r=5, at="^"))
    assert paths(model, dk.LoRA(r=5, at="^", exclude="1")) == ["0"]


def test_a_tied_layer_in_a_container_is_left_out_and_shown():
    planned = dk.plan(build("gpt2", tf.AutoModelForCausalLM), dk.LoRA(r=2, at="^"))
    assert "lm_head" not in planned.paths["lora"]
    assert "lm_head  left out: its weight is tied" in repr(planned)


def test_each_layer_is_tried_once_however_many_containers_hold_it(monkeypatch):
    tried, build_at = [], dk.LoRA.build_at
    # Each delta module is built, none copied.
    monkeypatch.setattr(dk.LoRA, "copied", ())
    monkeypatch.setattr(
        dk.LoRA, "build_at", lambda method, target: tried.append(target.path) or build_at(method, target)
    )
    assert sorted(paths(build("bert"), dk.LoRA(r=2, at=["attention", "layer", "encoder"]))) == sorted(set(tried))
    # Once to find whether the method can serve it, and once for the plan.
    assert set(map(tried.count, tried)) == {2}


def test_quantized_layers_and_convolutions_are_layers():
    class Packed(nn.Module):
        in_features, out_features, compute_dtype = 7, 5, torch.float32

        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.zeros(5, 7, dtype=torch.int8))

    model = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), Packed())})
    assert paths(model, dk.LoRA(r=2, at="a")) == ["a.0", "a.2"]


def test_a_saved_file_has_the_layers_and_is_not_expanded_again(tmp_path):
    model, fresh = build("bert"), build("bert")
    delta = randomize(dk.attach(model, dk.BitFit(at="attention", exclude="LayerNorm"), dk.LoRA(r=2, at="intermediate")))
    delta.save(tmp_path)
    loaded = dk.load(tmp_path, fresh)
    assert loaded.modules.keys() == delta.modules.keys()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(fresh(ids).last_hidden_state, model(ids).last_hidden_state)


def test_a_method_without_default_positions_keeps_the_container():
    class Halve(dk.OutputMap):
        def __init__(self, target):
            super().__init__(target)
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            return y * self.factor

    try:

        class Halved(dk.Method, name="halved"):
            kind = Halve

        assert paths(Transformer(), Halved(at="self_attn")) == [f"layers.{i}.self_attn" for i in (0, 1)]
    finally:
        dk.METHODS.pop("halved", None)
