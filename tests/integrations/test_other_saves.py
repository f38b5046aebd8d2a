"""Saves of a model with deltas that do not meet the `save_pretrained` on the object: the class's, and those of what is around."""

import copy
import warnings

import huggingface_hub
import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from deltakit.integrations import small_checkpoints
from integrations.test_save_pretrained import BATCH, attached, bert, values
from integrations.test_trainer import bert as with_dropout
from integrations.test_trainer import equal, trainer_of
from support.loopback_hub import LoopbackHub
from support.models import Transformer, ids, randomize, same, snapshot


def reloaded(folder):
    again, info = tf.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return again.eval()


def has_values(model, state):
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_function_of_the_class_saves_both(tmp_path):
    model = bert()
    before, state = snapshot(model), values(model)
    delta = attached(model, dk.LoRA(r=3), train="@head")
    tf.PreTrainedModel.save_pretrained(model, tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").iterdir())
    tf.PreTrainedModel.save_pretrained(copy.deepcopy(model), tmp_path)
    again = reloaded(tmp_path)
    has_values(again, state)
    dk.load(tmp_path, again)
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)
    assert "delta_lora" in " ".join(model.state_dict())
    delta.detach()
    same(before, snapshot(model))


def test_the_function_of_the_class_refuses_what_the_object_refuses(hub, monkeypatch, tmp_path):
    # transformers keeps a client with the settings of its first use.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    model = bert()
    attached(model, dk.LoRA(r=3))
    save = type(model).save_pretrained
    with pytest.raises(dk.StateError, match=r"would upload the model without its deltas; call model.push_to_hub"):
        save(model, str(tmp_path / "hub"), push_to_hub=True, token=LoopbackHub.TOKEN)
    with pytest.raises(dk.StateError, match="this BertModel is a part of the model that delta 'delta' is attached to"):
        type(model.bert).save_pretrained(model.bert, tmp_path / "part")
    attached(bert(), dk.LoRA(r=3)).save(tmp_path / "taken", format="peft")
    with pytest.raises(dk.CheckpointError, match="'peft' is here already"):
        save(model, tmp_path / "taken")
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.parametrize("several", [False, True])
def test_a_model_around_the_backbone_saves_its_deltas(several, tmp_path):
    model = bert()
    state = values(model)
    attached(model.bert, dk.LoRA(r=3), train="pooler", name="one")
    if several:
        attached(model.bert, dk.LoRA(r=2), name="two")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    again = reloaded(tmp_path)
    has_values(again, state)
    with pytest.raises(
        dk.CheckpointError, match=f"but in folders below: {'bert/one, bert/two' if several else 'bert'};"
    ):
        dk.load(tmp_path, again)
    for folder in [tmp_path / "bert" / name for name in ("one", "two")] if several else [tmp_path / "bert"]:
        dk.load(folder, again.bert)
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)
    if not several:
        with pytest.raises(
            dk.BackboneMismatch, match="trained on a BertModel .* found a BertForSequenceClassification"
        ):
            dk.load(tmp_path / "bert", bert())


def test_a_delta_of_an_earlier_save_above_the_part_is_refused(tmp_path):
    model = bert()
    delta = attached(model)
    model.save_pretrained(tmp_path)
    delta.detach()
    attached(model.bert)
    with pytest.raises(dk.CheckpointError, match="a delta of an earlier save is here, and would stay .* remove it"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "another")


@pytest.mark.parametrize("line", [lambda trainer: trainer, small_checkpoints])
def test_a_trainer_of_the_model_around(line, tmp_path):
    def model(alpha=16):
        whole = with_dropout()
        dk.attach(whole.bert, dk.LoRA(r=3, alpha=alpha, dropout=0.1), train="pooler", name="topic")
        return whole

    first, again = model(), model()
    trainer = trainer_of(first, tmp_path / "out")
    trainer.train()
    resume = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}
    line(trainer_of(again, tmp_path / "out")).train(**resume)
    equal(first.state_dict(), again.state_dict())
    with pytest.raises(dk.CheckpointError, match="other options of the delta 'topic': alpha was 16 and is 8"):
        trainer_of(model(8), tmp_path / "out").train(**resume)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = reloaded(tmp_path / "saved")
    # The head of the whole model is not the delta's, and was trained.
    equal(dk.base_state_dict(loaded), dk.base_state_dict(first))
    dk.load(tmp_path / "saved" / "bert", loaded.bert)
    assert torch.equal(loaded(BATCH).logits, first.eval()(BATCH).logits)


@pytest.mark.parametrize("part", [False, True])
def test_what_is_not_active_is_saved_too(part, tmp_path):
    model = bert()
    state = values(model)
    delta = attached(model.bert if part else model, dk.LoRA(r=3), train="pooler" if part else ["pooler", "@head"])
    expected = model(BATCH).logits
    delta.active = False
    type(model).save_pretrained(model, tmp_path / "model")
    again = reloaded(tmp_path / "model")
    has_values(again, state)
    dk.load(tmp_path / "model" / ("bert" if part else ""), again.bert if part else again)
    assert torch.equal(again(BATCH).logits, expected)
    # A checkpoint holds one value of each tensor.
    with pytest.warns(dk.DeltaWarning, match="has the backbone's own values of .*pooler.dense"):
        type(model).save_pretrained(model, tmp_path / "checkpoint-1")


def test_an_upload_of_the_model_around(hub, monkeypatch, tmp_path):
    # transformers keeps a client with the settings of its first use.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    model = bert()
    attached(model.bert)
    model.push_to_hub("me/model", token=LoopbackHub.TOKEN)
    found = hub.repos["me/model"].commits[-1][1]
    assert {
        "model.safetensors",
        "config.json",
        "bert/delta_model.safetensors",
        "bert/delta_config.json",
    } <= found.keys()


class Mixed(nn.Module, huggingface_hub.PyTorchModelHubMixin):
    """A module that huggingface_hub saves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.inner = Transformer()

    def forward(self, *inputs):
        return self.inner(*inputs)


def test_a_module_with_the_mixin_of_the_hub(tmp_path):
    model = Mixed().eval()
    state = values(model)
    attached(model.inner, dk.LoRA(r=3), train=())
    model.save_pretrained(tmp_path)
    again = Mixed.from_pretrained(tmp_path).eval()
    has_values(again, state)
    dk.load(tmp_path / "inner", again.inner)
    assert torch.equal(again(ids()), model(ids()))


class Own(nn.Module):
    """Saves itself by what deltakit gives it."""

    def __init__(self):
        super().__init__()
        self.inner = bert()

    def save_pretrained(self, folder):
        torch.save((dk.base_state_dict(self), dk.deltas(self)[0].state_dict()), folder / "own.pt")


def test_a_method_that_asks_for_the_own_values_gets_no_files(tmp_path):
    model = Own()
    attached(model.inner, train="@head")
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]


class Beside(nn.Module):
    """Saves a model that is no part of it."""

    def save_pretrained(self, folder, model):
        torch.save(model.state_dict(), folder / "model.pt")


def test_a_state_dict_of_another_model_stays_whole(tmp_path):
    model = bert()
    attached(model)
    Beside().save_pretrained(tmp_path, model)
    assert torch.load(tmp_path / "model.pt").keys() == model.state_dict().keys()
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_narrowed_state_dict_is_not_saved_as_the_model(tmp_path):
    model = bert()
    dk.LoraModel(model).freeze_module(exclude=["deltas", "classifier"], set_state_dict=True)
    randomize(dk.deltas(model)[0])
    with pytest.raises(dk.StateError, match=r"has narrowed the state dict .* call model.save_pretrained\(folder\)"):
        type(model).save_pretrained(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    reloaded(tmp_path / "two")


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


def test_save_model_of_accelerate_warns(accelerator, tmp_path):
    model = bert()
    delta = attached(model, name="topic")
    with pytest.warns(dk.DeltaWarning, match=r"tensors of delta 'topic' among .*unwrap_model\(model\).save_pretrained"):
        accelerator.save_model(model, tmp_path)
    assert "topic_lora" in " ".join(load_file(tmp_path / "model.safetensors"))
    delta.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerator.save_model(model, tmp_path)
