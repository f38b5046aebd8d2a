"""What a plan says about itself: rows with holes, double hits, ties, modules that are never called, and bytes."""

import json

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import SelfAttention, Transformer, ids, same, snapshot
from support.tiny_transformers import build


def told(model, *methods, **options):
    return [list(lines) for lines in dk.plan(model, *methods, **options).remarks]


class SharedValues(nn.Module):
    """Attention without values of its own, as in the last layers of Gemma 4."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = (nn.Linear(20, 20) for _ in range(3))


def hybrid(layers, without):
    model = Transformer(blocks=layers)
    for number in without:
        model.layers[number].self_attn = SharedValues()
    return model


def test_the_hole_of_gemma_4():
    model = hybrid(30, range(5, 30, 6))
    assert told(model, dk.LoRA(r=2, at="v_proj")) == [["25 of 30 in layers: not {5-29:6}"]]
    assert told(model, dk.LoRA(r=2, at="q_proj")) == [[]]
    # The queries in all layers do not hide the hole of the values.
    assert told(model, dk.LoRA(r=2, at="{q,v}_proj")) == [["v_proj: 25 of 30 in layers: not {5-29:6}"]]
    lines = repr(dk.plan(model, dk.LoRA(r=2, at="v_proj"))).splitlines()
    assert lines[2:4] == ["      layers.{0-28!5-23:6}.self_attn.v_proj", "      ! 25 of 30 in layers: not {5-29:6}"]


def test_a_choice_of_the_user_and_several_rows():
    model = build("t5")
    assert told(model, dk.Adapter(size=5, at="decoder.block.0.layer.2")) == [["1 of 2 in decoder.block: not 1"]]
    assert told(model, dk.LoRA(r=2, at="block.0.layer.0.SelfAttention.{q,v}")) == [
        ["1 of 2 in {encoder,decoder}.block: not 1"]
    ]
    # The layers in a block are of different classes, and so no row.
    assert told(model, dk.LoRA(r=2)) == [[]]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "mixtral", "clip", "vit", "bloom", "llama", "bart"])
@pytest.mark.parametrize("method", [dk.LoRA(r=2), dk.Adapter(size=3)])
def test_default_positions_have_no_holes(kind, method):
    assert told(build(kind), method) == [[]]


def test_blocks_of_different_classes_are_one_row():
    class Other(type(Transformer().layers[0])):
        pass

    model = Transformer(blocks=4)
    model.layers[2] = Other()
    model.layers[2].self_attn = SharedValues()
    assert told(model, dk.LoRA(r=2, at="v_proj")) == [["3 of 4 in layers: not 2"]]


def test_a_method_whose_option_differs_between_layers_has_no_hole():
    plan = dk.plan(Transformer(), dk.LoRA(r={"layers.0": 2, "*": 3}))
    assert len(plan.methods) == 2
    assert plan.remarks == ((), ())


def test_double_hits():
    model = Transformer()
    assert told(model, dk.LoRA(r=2, at="{q,v}_proj"), dk.BitFit(at="layers.0.**.{v,o}_proj")) == [
        [],
        ["1 of 2 in layers: not 1", "1 is also hit by lora: layers.0.self_attn.v_proj"],
    ]
    dk.attach(model, dk.LoRA(r=2, at="q_proj"), name="first")
    assert told(model, dk.LoRA(r=2, at="{q,v}_proj")) == [
        ["2 are hit by delta 'first' already: layers.{0-1}.self_attn.q_proj"]
    ]
    # Different slices of one projection have nothing in common.
    gpt = build("gpt2")
    assert told(gpt, dk.LoRA(r=2, at="c_attn[q]"), dk.BitFit(at="c_attn[v]")) == [[], []]
    assert told(gpt, dk.LoRA(r=2, at="c_attn[q]"), dk.BitFit(at="c_attn")) == [
        [],
        ["all are also hit by lora: h.{0-1}.attn.c_attn"],
    ]


def test_full_training_and_ties():
    model = Transformer()
    assert told(model, dk.LoRA(r=2, at="classifier"), train="classifier") == [
        ["all are trained fully by train=: classifier"]
    ]
    dk.attach(model, dk.LoRA(r=2, at="q_proj"), train="classifier", name="d")
    assert told(model, dk.BitFit(at="classifier")) == [["all are trained fully by delta 'd': classifier"]]
    tied = Transformer()
    tied.classifier = nn.Linear(20, 31, bias=False)
    tied.classifier.weight = tied.embed.weight
    assert told(tied, dk.LoRA(r=2, at="classifier", untie=True)) == [
        ["the weight at classifier is tied to embed.weight"]
    ]


class Spare(Transformer):
    """Has a layer that no forward calls, and one that only a longer input reaches."""

    def __init__(self):
        super().__init__()
        self.unused = SelfAttention()
        self.late = nn.Linear(20, 20)
        self.drop = nn.Dropout(0.5)
        self.batch_norm = nn.BatchNorm1d(20)

    def forward(self, input_ids):
        x = self.batch_norm(self.drop(self.embed(input_ids)).transpose(1, 2)).transpose(1, 2)
        x = self.late(x) if input_ids.shape[1] > 20 else x
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(1))


def test_modules_that_are_never_called():
    model = Spare().train()
    before, random = snapshot(model), torch.random.get_rng_state()
    lora = dk.LoRA(r=2, at=["v_proj", "late"])
    assert told(model, lora) == [[]]
    (lines,) = told(model, lora, inputs=ids())
    assert lines == ["2 are never called with these inputs: unused.v_proj, late"]
    (lines,) = told(model, lora, inputs={"input_ids": ids(2, 23)})
    assert lines == ["1 is never called with these inputs: unused.v_proj"]
    same(before, snapshot(model))
    assert torch.equal(random, torch.random.get_rng_state())


def test_weights_that_are_read_directly_are_used_in_the_forward_around():
    model = nn.TransformerEncoderLayer(6, 2, 10, batch_first=True)
    (lines,) = told(model, dk.LoRA(r=2, at=["in_proj_weight[q]", "out_proj", "linear1"]), inputs=torch.randn(2, 5, 6))
    assert not any("never called" in line for line in lines)


def test_inputs_that_do_not_fit():
    with pytest.raises(
        dk.OptionError, match=r"plan\(inputs=...\): the forward of the Transformer raised .*; pass what you"
    ):
        dk.plan(Transformer(), dk.LoRA(r=2), inputs=[ids(), 1])


def test_on_the_meta_device():
    with torch.device("meta"):
        model = Spare()
    (lines,) = told(model, dk.LoRA(r=2, at=["v_proj", "late"]), inputs=ids())
    assert lines == ["2 are never called with these inputs: unused.v_proj, late"]


def test_a_hit_inside_a_delta_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Transformer(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    (lines,) = told(model, dk.LoRA(r=1, at="layers.**", of=nn.Linear, exclude="base_layer"))
    where = "base_model.model.layers.{0-1}.self_attn.q_proj.{lora_A,lora_B}.default"
    assert f"4 are inside a delta of PEFT: {where}" in lines
    (lines,) = told(model, dk.LoRA(r=1, at="q_proj.base_layer"))
    assert lines == []


def test_bytes_and_json():
    model = Transformer().to(torch.bfloat16)
    plan = dk.plan(model, dk.LoRA(r=2, at="q_proj"), dk.BitFit(at="layers.0.norm_1"), train="classifier")
    assert plan.num_bytes == 2 * plan.num_parameters == 2 * (2 * 2 * 40 + 20)
    assert f"nothing is changed; +{plan.num_parameters:,} parameters (360 B), " in repr(plan)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["methods"][0]["where"] == ["layers.{0-1}.self_attn.q_proj"]
    assert data["methods"][1]["remarks"] == ["1 of 2 in layers: not 1"]
    assert data["fully_trained"] == ["classifier.weight", "classifier.bias"]
    assert data["parameters"] == plan.num_parameters


def test_a_miss_names_the_census():
    model = build("t5")
    with pytest.raises(dk.SelectorError, match=r"last components of its paths: shared, encoder, .*dk.targets\(model\)"):
        dk.plan(model, dk.LoRA(at="query"))
