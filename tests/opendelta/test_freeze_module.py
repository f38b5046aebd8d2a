"""`freeze_module` means what it means in OpenDelta: facts measured with OpenDelta itself."""

import copy
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file

import deltakit as dk
from support.models import randomize
from support.opendelta_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:.*new in this:deltakit.DeltaWarning")


def trained(model):
    """The last names of the parameters that require gradients, deltas' with the name of their method."""
    return {name.rpartition("delta_")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora(name="bert", **options):
    model = MODELS[name]()
    return model, dk.LoraModel(model, **options)


def test_it_freezes_all_but_the_deltas():
    model, delta = lora()
    delta.freeze_module()
    assert trained(model) == {"lora.A", "lora.B"}
    assert set(model.state_dict()) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (["deltas"], {"lora.A", "lora.B"}),
        ("deltas", {"lora.A", "lora.B"}),
        (["lora"], {"lora.A", "lora.B"}),
        (["lora_A"], {"lora.A"}),
        (["classifier"], {"classifier.weight", "classifier.bias"}),
        (["deltas", "classifier"], {"lora.A", "lora.B", "classifier.weight", "classifier.bias"}),
        ([], set()),
    ],
)
def test_an_exclude_without_deltas_freezes_the_deltas(exclude, expected):
    model, delta = lora()
    delta.freeze_module(exclude=exclude, set_state_dict=False)
    assert trained(model) == expected


def test_names_of_parameters():
    model, delta = lora()
    delta.freeze_module(exclude=["deltas", "bias"])
    # As in OpenDelta, without those of the layers with a delta.
    hosts = tuple(delta.delta.modules)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias") and not name.startswith(hosts)}
    assert trained(model) - {"lora.A", "lora.B"} == biases
    assert set(delta.delta.fully_trained) == biases


def test_a_name_that_is_only_of_a_parameter_beside_a_delta():
    """OpenDelta freezes it."""
    model, delta = lora()
    delta.freeze_module(exclude=["deltas", "query.weight"])
    assert sum(name.endswith("query.weight") for name in trained(model)) == 2


def test_unfrozen_modules_are_the_default():
    model, delta = lora(unfrozen_modules=["deltas", "classifier"])
    delta.freeze_module()
    assert trained(model) == {"lora.A", "lora.B", "classifier.weight", "classifier.bias"}


def test_what_was_frozen_before_stays_so():
    model, delta = lora()
    model.classifier.weight.requires_grad_(False)
    delta.freeze_module(exclude=["deltas", "classifier"])
    assert trained(model) == {"lora.A", "lora.B", "classifier.bias"}
    assert delta.delta.fully_trained == ["classifier.bias"]


def test_a_tied_parameter_is_frozen_unless_all_its_names_are_excluded():
    model, delta = lora("t5")
    with pytest.warns(dk.DeltaWarning, match="'lm_head' has no effect"):
        delta.freeze_module(exclude=["deltas", "lm_head"])
    assert trained(model) == {"lora.A", "lora.B"}
    assert delta.delta.fully_trained == []
    model, delta = lora("t5")
    delta.freeze_module(exclude=["deltas", "lm_head", "shared", "embed_tokens"])
    assert trained(model) == {"lora.A", "lora.B", "shared.weight"}
    assert "shared.weight" in delta.delta.fully_trained


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_tied_entry_without_effect_is_a_warning_that_says_what_has_one(name):
    model, delta = lora(name)
    with pytest.warns(dk.DeltaWarning, match="'lm_head' has no effect: its parameters are tied") as found:
        delta.freeze_module(exclude=["deltas", "lm_head"])
    advice = re.findall(r"'([\w.]+)'", str(found[0].message).partition("add all of")[2])
    delta.freeze_module(exclude=["deltas", *advice])
    assert model.lm_head.weight.requires_grad
    (own,) = {name for name in trained(model) if "lora" not in name}
    assert own in delta.delta.fully_trained


def test_the_advice_for_a_new_head_works_in_a_second_call():
    model, delta = lora()
    with pytest.warns(dk.DeltaWarning, match=r'pass exclude=\["deltas", "classifier"\] to train'):
        delta.freeze_module()
    delta.freeze_module(exclude=["deltas", "classifier"])
    assert trained(model) == {"lora.A", "lora.B", "classifier.weight", "classifier.bias"}
    assert set(delta.delta.fully_trained) == {"classifier.weight", "classifier.bias"}
    assert len(model.state_dict()) == 8 + 2


@pytest.mark.parametrize("by", ["user", "another delta"])
def test_an_entry_that_others_froze_is_a_warning_that_says_how_to_train_it(by):
    model, delta = lora()
    if by == "user":
        model.classifier.requires_grad_(False)
    else:
        delta.freeze_module(set_state_dict=False)
        delta = dk.AdapterModel(model)
    with pytest.warns(dk.DeltaWarning, match=r"'classifier' will not be trained: .* call requires_grad_\(True\)"):
        delta.freeze_module(exclude=["deltas", "classifier"])
    assert not model.classifier.weight.requires_grad
    model.classifier.requires_grad_(True)
    delta.freeze_module(exclude=["deltas", "classifier"])
    assert model.classifier.weight.requires_grad
    assert set(delta.delta.fully_trained) == {"classifier.weight", "classifier.bias"}


def test_a_head_outside_the_part_that_is_frozen_is_no_matter_of_a_warning(recwarn):
    model, delta = lora()
    delta.freeze_module(model.bert)
    assert model.classifier.weight.requires_grad
    assert not recwarn.list


def train_once(model):
    model.train()(torch.tensor([[3, 4, 5]]), labels=torch.tensor([1])).loss.backward()


def test_a_delta_that_is_frozen_on_purpose_is_no_warning(recwarn):
    model, delta = lora()
    delta.freeze_module(exclude=["classifier"])
    train_once(model)
    assert model.classifier.weight.grad is not None
    assert not recwarn.list
    # But something else that freezes it is one.
    delta.trainable = True
    delta.delta_modules.requires_grad_(False)
    with pytest.warns(dk.DeltaWarning, match=r"something froze them after attach\(\)"):
        train_once(model)


def test_trainable_is_that_of_the_handle():
    """The errors advise to set it."""
    model, delta = lora()
    delta.freeze_module()
    delta.delta_modules.requires_grad_(False)
    with pytest.raises(dk.StateError, match=r"set delta\.trainable = True"):
        train_once(model)
    delta.trainable = True
    train_once(model)
    assert all(parameter.grad is not None for parameter in delta.parameters())
    delta.trainable = False
    assert not any([delta.trainable, delta.delta.trainable, *(p.requires_grad for p in delta.parameters())])


def test_common_names():
    model, delta = lora("t5")
    delta.freeze_module(exclude=["deltas", "layer_norm@"])
    assert sum(p.requires_grad for name, p in model.named_parameters() if "layer_norm" in name) == 12


def test_a_part_of_the_backbone():
    model, delta = lora()
    delta.freeze_module(model.bert.encoder, set_state_dict=False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".encoder." in name and "delta_" not in name}
    delta.detach()
    assert not any(parameter.requires_grad for parameter in model.bert.encoder.parameters())
    assert model.classifier.weight.requires_grad


def test_a_module_around_the_backbone():
    model, delta = lora()
    around = torch.nn.ModuleDict({"backbone": model, "extra": torch.nn.Linear(5, 3)})
    delta.freeze_module(around, exclude=["deltas", "extra"])
    assert not model.classifier.weight.requires_grad
    assert len(around.state_dict()) == 8 + 2
    # Without this object, which knows of the module around the backbone.
    delta.delta.detach()
    assert len(around.state_dict()) == len(MODELS["bert"]().state_dict()) + 2
    delta.attach()
    assert len(around.state_dict()) == 8 + 2
    delta.detach()
    assert len(around.state_dict()) == len(MODELS["bert"]().state_dict()) + 2
    assert not around._state_dict_hooks


def test_several_deltas():
    model, first = lora()
    second = dk.AdapterModel(model)
    first.freeze_module()
    assert trained(model) >= {"lora.A", "lora.B"}
    assert sum("adapter" in name for name in trained(model)) == 4
    # As often as one likes: in OpenDelta a second call raises, unless set_state_dict=False.
    second.freeze_module()
    second.detach()
    assert trained(model) == {"lora.A", "lora.B"}


def test_a_second_delta_at_one_place():
    model, first = lora()
    second = dk.LoraModel(model, lora_r=3)
    randomize(first.delta), randomize(second.delta)
    ids = torch.tensor([[3, 4, 5]])
    both = model.eval()(ids).logits
    first.detach()
    only_second = model(ids).logits
    first.attach()
    assert torch.equal(model(ids).logits, both)
    second.detach()
    first.detach()
    # Whichever comes first, and also if they were never attached at the same time.
    second.attach()
    assert torch.equal(model(ids).logits, only_second)
    first.attach()
    torch.testing.assert_close(model(ids).logits, both)
    assert len({delta.name for delta in dk.deltas(model)}) == 2


def test_the_state_dict_is_that_of_the_model_again_after_detaching():
    model, delta = lora()
    delta.freeze_module()
    assert len(model.state_dict()) == 8
    whole = dk.base_state_dict(model)
    delta.detach()
    assert list(model.state_dict()) == list(whole) == list(MODELS["bert"]().state_dict())
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    assert not model._state_dict_hooks
    delta.attach()
    assert len(model.state_dict()) == 8
    # By deltakit's own handle, too.
    dk.deltas(model)[0].detach()
    assert not model._state_dict_hooks


def test_a_parent_keeps_everything(tmp_path):
    """In OpenDelta it loses what came before the module. Its `save_pretrained` would write a model without its weights."""
    model = MODELS["bert"]()
    expected, bare = sorted(model.state_dict()), copy.deepcopy(model.bert)
    delta = dk.LoraModel(model.bert)
    delta.freeze_module()
    assert len(model.bert.state_dict()) == 8
    assert sorted(name for name in model.state_dict() if "lora" not in name) == expected
    randomize(delta.delta)
    model.save_pretrained(tmp_path)
    assert expected == sorted(load_file(tmp_path / "model.safetensors"))
    loaded = dk.load(tmp_path / "bert", bare).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in delta.delta.state_dict().items())


def test_a_narrowed_state_dict_is_no_model(tmp_path):
    model, delta = lora()
    bare = sorted(MODELS["bert"]().state_dict())
    randomize(delta.delta)
    delta.freeze_module()
    with pytest.raises(
        dk.StateError, match=r"state_dict= lacks 41 of the model's tensors, such as .*; omit state_dict="
    ):
        model.save_pretrained(tmp_path / "narrow", state_dict=model.state_dict())
    assert not (tmp_path / "narrow").exists()
    model.save_pretrained(tmp_path / "whole")
    # A checkpoint of a model that is trained too has it whole.
    model.classifier.weight.requires_grad_(True)
    model.save_pretrained(tmp_path / "checkpoint-1")
    model, delta = lora()
    randomize(delta.delta)
    delta.freeze_module(set_state_dict=False)
    model.save_pretrained(tmp_path / "wide", state_dict=model.state_dict())
    for name in ("whole", "wide", "checkpoint-1"):
        saved = load_file(tmp_path / name / "model.safetensors")
        assert sorted(x for x in saved if "lora" not in x and "deltakit" not in x) == bare


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_narrowed_on_their_own(copied):
    model, delta = lora()
    delta.freeze_module()
    other = copied(model)
    assert list(other.state_dict()) == list(model.state_dict())
    dk.deltas(other)[0].detach()
    assert len(other.state_dict()) == len(MODELS["bert"]().state_dict())
    assert not other._state_dict_hooks
    assert len(model.state_dict()) == 8
    copy_of_delta = copy.deepcopy(delta)
    assert copy_of_delta.backbone_model is not model
    copy_of_delta.detach()
    assert len(copy_of_delta.backbone_model.state_dict()) == len(other.state_dict())
    assert delta.delta.attached


def test_a_trained_head_goes_with_its_delta(tmp_path):
    model, delta = lora()
    delta.freeze_module(exclude=["deltas", "classifier"])
    own = model.classifier.weight.detach().clone()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    delta.save_finetuned(tmp_path / "delta")
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    logits = model.eval()(torch.tensor([[3, 4, 5]])).logits
    fresh = MODELS["bert"]()
    fresh.load_state_dict(dk.base_state_dict(model), strict=True)
    dk.AutoDeltaModel.from_finetuned(tmp_path / "delta", fresh)
    assert torch.equal(fresh(torch.tensor([[3, 4, 5]])).logits, logits)
    # As scripts do it with torch alone.
    other = MODELS["bert"]().eval()
    other.load_state_dict(dk.base_state_dict(model), strict=True)
    dk.LoraModel(other)
    other.load_state_dict(torch.load(tmp_path / "trained.pt"), strict=False)
    assert torch.equal(other(torch.tensor([[3, 4, 5]])).logits, logits)
    delta.detach()
    assert torch.equal(model.classifier.weight, own)
