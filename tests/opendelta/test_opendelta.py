"""Code written for OpenDelta runs: the founding notes' demo, with the methods there are."""

import re

import pytest
import torch
import transformers as tf

import deltakit as dk
from deltakit import AutoDeltaConfig, AutoDeltaModel, Visualization
from support.backbone_inputs import hidden, inputs
from support.models import randomize, same, snapshot
from support.tiny_transformers import build

OPTIONS = {
    "lora": {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.1},
    "adapter": {"bottleneck_dim": 5, "non_linearity": "gelu_new"},
    "bitfit": {"modified_modules": ["SelfAttention.q"]},
    "prefix": {"prefix_token_num": 2, "reparameterize": True, "mid_dim": 7},
    "soft_prompt": {"soft_token_num": 4, "token_init": False},
}


def model():
    return build("t5", tf.AutoModelForSeq2SeqLM)


@pytest.mark.parametrize("delta_type", OPTIONS)
def test_from_config_save_and_from_finetuned(delta_type, tmp_path, capsys):
    backbone, fresh = model(), model()
    batch = inputs("t5", backbone)
    before = snapshot(backbone)
    config = AutoDeltaConfig.from_dict({"delta_type": delta_type, **OPTIONS[delta_type]})
    delta = AutoDeltaModel.from_config(config, backbone_model=backbone)
    assert type(delta).delta_type == delta_type
    assert any(p.requires_grad for p in backbone.shared.parameters())
    delta.freeze_module(exclude=["deltas", "final_layer_norm"])
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad and "delta_" not in name}
    assert trained == {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}
    randomize(delta.delta)
    delta.log()
    printed = capsys.readouterr()
    assert printed.out.startswith("root\n")
    assert re.search(r"Trainable Ratio: \d+/\d+=[\d.]+%\nDelta Parameter Ratio: \d+/\d+=[\d.]+%\n", printed.err)
    output = hidden(backbone(**batch))
    delta.save_finetuned(tmp_path)
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert type(loaded) is type(delta)
    torch.testing.assert_close(hidden(fresh(**batch)), output)
    delta.detach()
    backbone.requires_grad_(True)
    same(before, snapshot(backbone))
    # With a position bias that requires gradients, torch takes another attention kernel.
    backbone.requires_grad_(False)
    delta.attach()
    assert torch.equal(hidden(backbone(**batch)), output)


def test_three_tasks_on_one_backbone(tmp_path):
    backbone = model()
    for name, kind in (("spelling", dk.AdapterModel), ("topic", dk.LoraModel), ("fact", dk.BitFitModel)):
        one = kind(backbone)
        randomize(one.delta)
        one.save_finetuned(tmp_path / name)
        one.detach()
    tasks = []
    for name in ("spelling", "topic", "fact"):
        tasks.append(AutoDeltaModel.from_finetuned(tmp_path / name, backbone_model=backbone))
        tasks[-1].detach()
    text = torch.tensor([[3, 4, 5, 6]])

    def answer(task):
        task.attach()
        ids = backbone.generate(input_ids=text, max_length=20, num_beams=4)
        task.detach()
        return ids

    first = [answer(task) for task in tasks]
    assert all(torch.equal(a, b) for a, b in zip(first, [answer(task) for task in tasks], strict=True))
    assert str(Visualization(backbone).structure_graph(print_tree=False)).startswith("root\n")


def test_several_methods_come_back_as_one_delta(tmp_path):
    backbone = model()
    randomize(dk.attach(backbone, dk.LoRA(r=2), dk.BitFit())).save(tmp_path)
    assert type(AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model())).__name__ == "DeltaBase"


def test_errors():
    with pytest.raises(dk.OptionError, match="unknown delta_type 'magic'; use one of lora, adapter"):
        AutoDeltaConfig.from_dict({"delta_type": "magic"})
    with pytest.warns(dk.DeltaWarning, match=r"LoraConfig\.from_dict: lora_rank are no options of this delta type"):
        config = AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_rank": 3, "lora_r": 5})
    assert config.lora_r == 5
    with pytest.raises(
        dk.OptionError, match=r"LoraModel\(lora_rank=...\): no such option; write lora_r= for lora_rank"
    ):
        dk.LoraModel(model(), lora_rank=3)


def trained_values(backbone):
    return sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)


def test_a_frozen_backbone_stays_frozen_for_the_next_delta():
    backbone = model()
    first = dk.LoraModel(backbone)
    first.freeze_module()
    only_delta = trained_values(backbone)
    assert only_delta == first.delta.num_parameters
    first.detach()
    assert trained_values(backbone) == 0
    second = dk.LoraModel(backbone)
    assert trained_values(backbone) == only_delta
    # Whichever of two is detached first.
    third = dk.AdapterModel(backbone)
    second.detach()
    assert trained_values(backbone) == third.delta.num_parameters
    third.detach()
    backbone.shared.requires_grad_(True)
    dk.LoraModel(backbone).detach()
    assert trained_values(backbone) == sum(p.numel() for p in backbone.shared.parameters())


def test_what_freeze_module_excludes_belongs_to_its_delta():
    backbone = model()
    first = dk.LoraModel(backbone)
    first.freeze_module(exclude=["deltas", "final_layer_norm"])
    trained = trained_values(backbone)
    assert trained > sum(p.numel() for modules in first.delta.modules.values() for m in modules for p in m.parameters())
    first.detach()
    # As in OpenDelta, what is excluded is left as it is, so that another delta can train it.
    assert trained_values(backbone) == sum(
        p.numel() for name, p in backbone.named_parameters() if "final_layer" in name
    )
    first.attach()
    assert trained_values(backbone) == trained
    with pytest.warns(dk.DeltaWarning, match="'no_such_module' matched nothing and has no effect"):
        dk.AdapterModel(backbone).freeze_module(exclude=["deltas", "no_such_module"])


def test_a_new_head_that_freeze_module_would_freeze_is_named():
    config = build("bert").config
    backbone = tf.BertForSequenceClassification(config)
    delta = dk.LoraModel(backbone)
    for exclude in ((), ("deltas",), "deltas"):
        with pytest.raises(dk.DeltaWarning, match=r'^classifier: .*; pass exclude=\["deltas", "classifier"\] to train'):
            delta.freeze_module(exclude=exclude)
    with pytest.raises(dk.DeltaWarning, match=r'; pass exclude=\["deltas", "bert\.pooler", "classifier"\] to train'):
        delta.freeze_module(exclude=["deltas", "bert.pooler"])
    delta.freeze_module(exclude=["deltas", "classifier"])
    assert set(delta.delta.fully_trained) == {"classifier.weight", "classifier.bias"}
    # The user can say that it is trained already.
    trained = tf.BertForSequenceClassification(config)
    trained.classifier.requires_grad_(False)
    delta = dk.LoraModel(trained)
    delta.freeze_module()
    assert trained_values(trained) == delta.delta.num_parameters
