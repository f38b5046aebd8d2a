"""A delta that nobody trains: frozen by somebody else, without an optimiser, or of another model than the one trained."""

import copy

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build

FROZEN = r"delta 'delta' is trainable, but none of the 8 parameters of its modules requires gradients in this training forward"
UNTRAINED = "is saved as it was attached: none of the parameters of its modules has changed since"


@pytest.fixture
def model():
    return Transformer().train()


def step(model, optimizer=None):
    model(ids()).square().sum().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def test_a_training_forward_that_trains_nothing_is_an_error(model):
    delta = dk.attach(model, dk.LoRA(r=3))
    step(model)
    model.layers.requires_grad_(False)
    for _ in range(2):
        with pytest.raises(dk.StateError, match=FROZEN):
            model(ids())
    # What is no training, or not to be trained.
    model.eval()(ids())
    model.train()
    with torch.no_grad():
        model(ids())
    delta.active = False
    model(ids())
    delta.active = True
    # The two ways out that the message names.
    delta.trainable = False
    model(ids())
    delta.trainable = True
    step(model)
    assert all(parameter.grad is not None for parameter in delta.parameters())


def test_a_part_that_is_frozen_by_hand_is_the_user_s(model):
    delta = dk.attach(model, dk.LoRA(r=3))
    for name, parameter in delta.named_parameters():
        parameter.requires_grad_(name.endswith("layers.1.self_attn.v_proj.lora.B"))
    step(model)
    assert sum(parameter.grad is not None for parameter in delta.parameters()) == 1


def test_each_delta_is_looked_at(model):
    dk.attach(model, dk.LoRA(r=3), name="one")
    two = dk.attach(model, dk.Adapter(size=2), name="two")
    for parameter in two.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(dk.StateError, match="delta 'two' is trainable, but none"):
        model(ids())
    two.detach()
    step(model)


def test_a_head_that_is_trained_alone_is_a_warning(model):
    delta = dk.attach(model, dk.LoRA(r=3), train="@head")
    model.layers.requires_grad_(False)
    with pytest.warns(dk.DeltaWarning, match=FROZEN + ".* of this delta only classifier"):
        step(model)
    step(model)
    model.classifier.requires_grad_(False)
    with pytest.raises(dk.StateError, match=FROZEN):
        model(ids())
    delta.trainable = True
    step(model)


def test_another_library_freezes_all():
    model = Transformer().train()
    dk.attach(model, dk.LoRA(r=3))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(dk.StateError, match="none of the 8 parameters of its modules requires gradients"):
        model(ids())


def test_functional_calls_may_pass_tensors_without_gradients(model):
    dk.attach(model, dk.LoRA(r=3))
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, values, (ids(),))


def test_copies_are_looked_at_too(model):
    dk.attach(model, dk.LoRA(r=3))
    step(model)
    other = copy.deepcopy(model)
    other.requires_grad_(False)
    with pytest.raises(dk.StateError, match=FROZEN):
        other(ids())
    step(model)
    dk.deltas(other)[0].detach()
    other(ids())


def test_an_optimiser_from_before_attach_trains_nothing(model, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    delta = dk.attach(model, dk.LoRA(r=3), train="@head")
    head = model.classifier.weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model.classifier.weight, head)
    with pytest.warns(dk.DeltaWarning, match=UNTRAINED):
        delta.save(tmp_path)
    step(model, torch.optim.SGD(delta.parameters(), lr=0.1))
    delta.save(tmp_path)


def test_a_handle_of_another_model(tmp_path):
    """As after `Trainer(model_init=...)`: another model is trained than the one the handle belongs to."""

    def model_init():
        model = Transformer().train()
        dk.attach(model, dk.LoRA(r=3))
        return model

    handle, model = dk.deltas(model_init())[0], model_init()
    step(model, torch.optim.SGD(dk.deltas(model)[0].parameters(), lr=0.1))
    with pytest.warns(dk.DeltaWarning, match=UNTRAINED + r".* dk\.deltas\(model\) returns a model's own"):
        handle.save(tmp_path)
    dk.deltas(model)[0].save(tmp_path)


@pytest.mark.parametrize(
    "method", [dk.LoRA(r=3), dk.IA3(), dk.Prefix(tokens=2, reparam=True), dk.BitFit(), dk.Adapter(size=2)]
)
def test_values_that_torch_does_not_see_change(model, method, tmp_path):
    """Optimisers that write through `.data`, or in kernels of their own, raise no version."""
    delta = dk.attach(model, method)
    versions = [parameter._version for parameter in delta.parameters()]
    with pytest.warns(dk.DeltaWarning, match=UNTRAINED):
        delta.save(tmp_path)
    model.half().float()
    for parameter in delta.parameters():
        parameter.data.add_(0.5)
    assert versions == [parameter._version for parameter in delta.parameters()]
    delta.save(tmp_path)


@pytest.mark.parametrize(
    "method", [dk.LoRA(r=3), dk.LoRA(r=3, at="embed"), dk.Adapter(size=2), dk.SoftPrompt(tokens=2)]
)
def test_a_learning_rate_of_zero(model, method, tmp_path):
    delta = dk.attach(model, method)
    step(model, torch.optim.SGD(delta.parameters(), lr=0.0))
    with pytest.warns(dk.DeltaWarning, match=UNTRAINED):
        delta.save(tmp_path)
    step(model, torch.optim.SGD(delta.parameters(), lr=0.1))
    delta.save(tmp_path)


def test_a_value_between_the_samples_is_enough(tmp_path):
    model = nn.Sequential(nn.Linear(300, 300))
    delta = dk.attach(model, dk.LoRA(r=1, at="0"))
    with torch.no_grad():
        next(iter(delta.modules["0"])).A[0, 1] += 1
    delta.save(tmp_path)


def test_one_trained_parameter_is_enough(tmp_path):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(29)))
    delta = dk.attach(model, dk.LoRA(r=1, at="**", of=nn.Linear))
    with torch.no_grad():
        next(iter(delta.modules["7"])).B.add_(1)
    delta.save(tmp_path)


def test_what_comes_from_a_file_may_be_saved_unchanged(model, tmp_path):
    delta = randomize(dk.attach(model, dk.LoRA(r=3)))
    state = delta.detach().state_dict()
    loaded = dk.load(delta.save(tmp_path / "one"), model)
    loaded.save(tmp_path / "two")
    loaded.detach()
    new = dk.attach(model, dk.LoRA(r=3), name="new")
    new.load_state_dict(state)
    new.save(tmp_path / "three")
    mixed = dk.combine(model, {new: 0.5}).delta
    mixed.save(tmp_path / "four")
    fresh = dk.attach(model, dk.LoRA(r=3), name="fresh")
    with pytest.warns(dk.DeltaWarning, match=UNTRAINED):
        fresh.save(tmp_path / "five")
    fresh.swap(loaded)
    fresh.save(tmp_path / "six")


def test_the_trainer_makes_its_own_model(tmp_path):
    def model_init():
        torch.manual_seed(3)
        model = tf.AutoModelForSequenceClassification.from_config(build("bert").config)
        dk.attach(model, dk.LoRA(r=2), train="@head")
        return model

    handle = dk.deltas(model_init())[0]
    data = [{"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "labels": 1}] * 4
    options = tf.TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    trainer = tf.Trainer(model_init=model_init, args=options, train_dataset=data)
    trainer.train()
    with pytest.warns(dk.DeltaWarning, match=UNTRAINED):
        handle.save(tmp_path / "handle")
    dk.deltas(trainer.model)[0].save(tmp_path / "model")
