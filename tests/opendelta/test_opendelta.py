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
    assert re.search(r"trainable [\d.]+ %, delta [\d.]+ % of", capsys.readouterr().out)
    output = hidden(backbone(**batch))
    delta.save_finetuned(tmp_path)
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert type(loaded) is type(delta)
    torch.testing.assert_close(hidden(fresh(**batch)), output)
    delta.detach()
    same(before, snapshot(backbone))
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
    dk.attach(backbone, dk.LoRA(r=2), dk.BitFit()).save(tmp_path)
    assert type(AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model())).__name__ == "DeltaModel"


def test_errors():
    with pytest.raises(dk.OptionError, match="unknown delta_type 'magic'; use one of lora, adapter"):
        AutoDeltaConfig.from_dict({"delta_type": "magic"})
    config = AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_rank": 3})
    with pytest.raises(dk.OptionError, match="LoraModel: .*'lora_rank'"):
        AutoDeltaModel.from_config(config, backbone_model=model())
