"""Detaching and saving after the user replaced, resized, moved or reparametrized what a delta stands on."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import deltakit as dk
from support.models import Transformer, attached, ids, randomize, same, snapshot
from support.tiny_transformers import build


@pytest.fixture
def model():
    return Transformer().eval()


def trained(model, **options):
    """A delta that fully trains the classifier, with other values there."""
    delta = attached(model, dk.LoRA(r=2), **options)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    return delta


@pytest.mark.parametrize("classes", [3, 5])
def test_a_replaced_head_that_is_fully_trained(model, tmp_path, classes):
    before, bare, head = snapshot(model), model(ids()), model.classifier
    delta = trained(model, train="classifier")
    output, values = model(ids()), {name: value.clone() for name, value in delta.state_dict().items()}
    model.classifier = new = nn.Linear(20, classes)
    own = new.weight.detach().clone()
    with pytest.raises(
        dk.StateError, match="classifier: the Linear that delta 'delta' was attached to is no longer in"
    ):
        delta.save(tmp_path)
    delta.detach()
    assert torch.equal(new.weight, own)
    assert new.weight.requires_grad
    if classes == 3:
        # It fits, so the trained values go into the new head until the delta is detached.
        delta.attach().detach()
        assert torch.equal(new.weight, own)
    else:
        with pytest.raises(
            dk.StateError, match=r"classifier\.weight: .* attaching is not possible then: undo that change"
        ):
            delta.attach()
    # What the error advises: values that still fit go into a new delta.
    other = dk.attach(model, dk.LoRA(r=2))
    other.load_state_dict({name: delta.state_dict()[name] for name in other.state_dict()})
    other.detach()
    # Or the change is undone: nothing is lost.
    model.classifier = head
    same(before, snapshot(model))
    assert torch.equal(model(ids()), bare)
    assert all(torch.equal(value, values[name]) for name, value in delta.state_dict().items())
    delta.attach()
    assert torch.equal(model(ids()), output)
    delta.save(tmp_path)


def test_a_head_of_the_same_shape_is_not_written_into(model):
    """Neither by another delta's attaching, which looks at the backbone anew, nor by detaching."""
    delta = trained(model, train="classifier")
    model.classifier = new = nn.Linear(20, 3)
    own = new.weight.detach().clone()
    other = dk.attach(model, dk.BitFit(), name="other")
    delta.detach()
    other.detach()
    assert torch.equal(new.weight, own)


def test_a_merged_target_that_is_replaced(model):
    head = model.classifier
    bare = model(ids())
    delta = attached(model, dk.LoRA(r=2, at=["classifier", "q_proj"])).merge()
    model.classifier = new = nn.Linear(20, 3)
    own = new.weight.detach().clone()
    delta.detach()
    assert torch.equal(new.weight, own)
    model.classifier = head
    assert torch.equal(model(ids()), bare)


def test_a_removed_target(model):
    delta = trained(model, train="classifier")
    before = {name: p for name, p in model.named_parameters() if "delta" not in name and "classifier" not in name}
    removed = model.layers[1]
    del model.layers[1]
    del model.classifier
    delta.detach()
    assert not [name for name in model.state_dict() if "delta" in name]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in before.values())
    assert not [name for name in removed.state_dict() if "delta" in name]


def test_a_delta_module_that_was_deleted(model):
    delta = attached(model, dk.LoRA(r=2))
    bare = copy.deepcopy(model)
    dk.deltas(bare)[0].detach()
    del model.layers[0].self_attn.q_proj.delta_lora
    assert delta.attached
    delta.detach()
    same(snapshot(bare), snapshot(model))


class TestResizedEmbeddings:
    """transformers changes the embedding in place, and keeps its first rows."""

    def model(self):
        model = build("bert")
        return model, lambda m, last=90: m(input_ids=torch.tensor([[5, 9, last]])).last_hidden_state

    def resize(self, model, size=103):
        torch.manual_seed(4)
        model.resize_token_embeddings(size, mean_resizing=False)

    def test_fully_trained(self, tmp_path):
        model, run = self.model()
        base = copy.deepcopy(model)
        delta = attached(model, dk.LoRA(r=2), train="word_embeddings")
        with torch.no_grad():
            model.embeddings.word_embeddings.weight.add_(1)
        for each in (model, base):
            self.resize(each)
        output = run(model, 101)
        dk.load(delta.save(tmp_path), copy.deepcopy(base))
        with pytest.warns(dk.DeltaWarning, match=r"word_embeddings\.weight: .* it was resized while the delta was"):
            delta.detach()
        assert not delta.attached
        assert torch.equal(run(model), run(base))
        delta.attach()
        assert torch.equal(run(model, 101), output)

    def test_resized_while_detached(self):
        model, _ = self.model()
        delta = attached(model, dk.LoRA(r=2), train="word_embeddings").detach()
        self.resize(model)
        with pytest.raises(dk.StateError, match=r"with the shape \(97, 24\), and it has the shape \(103, 24\) now"):
            delta.attach()
        assert not delta.attached
        self.resize(model, 97)
        delta.attach().detach()

    def test_low_rank(self, tmp_path):
        model, run = self.model()
        base = copy.deepcopy(model)
        delta = attached(model, dk.LoRA(r=2, at="word_embeddings"))
        output = run(model)
        for each in (model, base):
            self.resize(each)
        assert torch.equal(run(model), output)
        with pytest.raises(
            dk.StateError, match="LoRA was attached to an embedding of 97 ids, and there are ids beyond"
        ):
            run(model, 101)
        with pytest.raises(
            dk.StateError, match=r"a Embedding of sizes \(97, 24\), and it has the sizes \(103, 24\) now"
        ):
            delta.save(tmp_path)
        delta.detach()
        assert torch.equal(run(model), run(base))

    def test_soft_prompts_do_not_take_new_tokens_for_theirs(self):
        model, run = self.model()
        delta = attached(model, dk.SoftPrompt(tokens=3))
        run(model)
        self.resize(model)
        with pytest.raises(dk.StateError, match="uses the ids from 97 on, and the embedding has 103 of its own"):
            run(model)
        delta.detach()
        run(model, 101)


CHANGES = {
    "half": lambda model, layer: model.bfloat16(),
    "double": lambda model, layer: model.double(),
    "prune": lambda model, layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrize": lambda model, layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    "weight_norm": lambda model, layer: parametrizations.weight_norm(layer),
    "copy_": lambda model, layer: layer.load_state_dict({name: t * 2 for name, t in layer.state_dict().items()}, False),
    "tie": lambda model, layer: setattr(model.layers[1].mlp.up_proj, "weight", layer.weight),
}


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_the_backbone_meanwhile_stays(model, change, detached):
    delta = trained(model, train="classifier")
    base = copy.deepcopy(model)
    dk.deltas(base)[0].detach()
    if detached:
        delta.detach()
    for each in (model, base):
        CHANGES[change](each, each.layers[0].mlp.up_proj)
    if detached:
        delta.attach()
    assert not torch.equal(model(ids()), base(ids()))
    if change in ("half", "double", "copy_", "tie"):
        delta.merge()
    delta.detach()
    found, wanted = snapshot(model), snapshot(base)
    # Each parametrized module has a class of its own.
    assert [kind.__name__ for kind in found.pop("types")] == [kind.__name__ for kind in wanted.pop("types")]
    assert {part for part, value in wanted.items() if part != "values" and found[part] != value} == set()
    torch.testing.assert_close(found["values"], wanted["values"], rtol=0, atol=0)
    assert torch.equal(model(ids()), base(ids()))


@pytest.mark.parametrize("change", ["prune", "parametrize", "weight_norm"])
def test_a_weight_patch_on_a_weight_that_is_computed_is_an_error(model, change):
    delta = attached(model, dk.LoRA(r=2, at="layers.0.mlp.up_proj.weight"))
    model(ids())
    CHANGES[change](model, model.layers[0].mlp.up_proj)
    with pytest.raises(
        dk.StateError, match="weight of a .* is computed from other tensors .* a weight patch has no effect"
    ):
        model(ids())
    delta.detach()
    model(ids())


def test_moved_while_detached():
    """Tested without a second device: parameters on the meta device have no values."""
    model = nn.Sequential(nn.Linear(7, 5))
    delta = dk.attach(model, dk.LoRA(r=2, at="0")).detach()
    (module,) = delta.modules["0"]
    moved = []
    module.to = lambda device: moved.append(device)
    delta.attach().detach()
    assert not moved


@pytest.mark.parametrize("size", [60, 40])
def test_a_head_that_was_resized_into_a_new_module_has_the_backbone_s_rows_again(size):
    model = build("llama", tf.AutoModelForCausalLM, tie_word_embeddings=False, vocab_size=50)
    own = model.lm_head.weight.detach().clone()
    delta = randomize(dk.attach(model, dk.LoRA(r=2), train="lm_head"))
    model.resize_token_embeddings(size)
    rows = min(size, 50)
    assert not torch.equal(model.lm_head.weight[:rows], own[:rows])
    with pytest.warns(UserWarning, match=r"lm_head\.weight: .* was resized while the delta was attached"):
        delta.detach()
    assert torch.equal(model.lm_head.weight[:rows], own[:rows])


@pytest.mark.parametrize("size", [60, 40])
def test_a_weight_patch_on_a_resized_embedding(size):
    model = build("llama", vocab_size=50).eval()
    delta = dk.attach(model, dk.LoRA(r=2, at="embed_tokens.weight"), train=())
    x = torch.arange(3, 9)[None]
    model(input_ids=x)
    model.resize_token_embeddings(size)
    with pytest.raises(dk.StateError, match=r"Embedding: .*was resized.*detach\(\) the delta and attach a new one"):
        model(input_ids=x)
    delta.detach()
    model(input_ids=x)


def wrap(model):
    """The classifier is then found under another name."""
    model.classifier = nn.Sequential(nn.Dropout(0.0), model.classifier)


def exchange(model):
    model.norm, model.layers[0].norm_1 = model.layers[0].norm_1, model.norm


@pytest.mark.parametrize("change", [wrap, exchange])
@pytest.mark.parametrize("train", [(), "classifier"])
@pytest.mark.parametrize("again", [False, True])
def test_flags_follow_parameters_that_get_another_name(model, change, train, again):
    model.norm.weight.requires_grad_(False)
    flags = {p: p.requires_grad for p in model.parameters()}
    delta = dk.attach(model, dk.LoRA(r=2, at="q_proj"), train=train)
    change(model)
    if again:
        dk.attach(model, dk.BitFit(at="v_proj"), name="other").detach()
    trained = {p for p in model.parameters() if p.requires_grad}
    assert trained == set(delta.parameters())
    delta.detach()
    assert {p: p.requires_grad for p in model.parameters()} == flags


def hooks_in(module):
    """What a module and those in it hold of deltakit."""
    return [
        (path, hook)
        for path, inner in module.named_modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
        for hook in vars(inner)[name].values()
        if "deltakit" in type(getattr(getattr(hook, "hook", hook), "__self__", getattr(hook, "hook", hook))).__module__
    ]


@pytest.mark.parametrize("put_back", ["before", "after"])
@pytest.mark.parametrize("merged", [False, True])
def test_nothing_stays_on_what_was_taken_out(put_back, merged):
    model = build("bert")
    delta = dk.attach(model, dk.LoRA(r=2), name="one", train=["pooler", "layer.1.output"])
    other = dk.attach(model, dk.LoRA(r=2), name="two")
    layers, pooler = model.encoder.layer, model.pooler
    if merged:
        delta.merge()
    model.encoder.layer, model.pooler = layers[:1], None
    with pytest.warns(dk.DeltaWarning) if put_back == "after" else nullcontext():
        if put_back == "after":
            model(torch.tensor([[3, 4]]))
        else:
            model.encoder.layer, model.pooler = layers, pooler
    other.detach()
    delta.detach()
    model.encoder.layer, model.pooler = layers, pooler
    assert hooks_in(model) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_nothing_stays_on_quantized_layers():
    """torch copies the hooks of a layer to the quantized one that replaces it."""
    model = nn.Sequential(nn.Linear(7, 5), nn.LSTM(5, 4)).eval()
    delta = dk.attach(model, dk.LoRA(r=2, at=["0", "1.weight_hh_l0"]), train=())
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}, inplace=True)
    assert hooks_in(model[0])
    delta.detach()
    assert hooks_in(model) == []


def take_out(model):
    model.classifier = nn.Identity()


@pytest.mark.parametrize("change", [wrap, take_out])
@pytest.mark.parametrize("call", ["active", "freeze", "load_state_dict"])
def test_switching_and_training_after_a_fully_trained_module_moved(model, change, call):
    head = model.classifier
    delta = trained(model, train="classifier")
    other = dk.attach(model, dk.BitFit(at="norm"), name="other", train="norm")
    own, values = delta._record.backbone_values["classifier.weight"].clone(), head.weight.detach().clone()
    change(model)
    if call == "active":
        delta.active = False
        assert torch.equal(head.weight, own)
        delta.active = True
    elif call == "freeze":
        other.freeze(train="layers.0.norm_1")
    else:
        other.load_state_dict({name: value.clone() for name, value in other.state_dict().items()})
    assert torch.equal(head.weight, values)
    if change is wrap:
        with pytest.raises(dk.StateError, match="delta 'delta' fully trains it already; detach"):
            other.freeze(train="classifier")
    delta.detach()
    assert torch.equal(head.weight, own)


def test_printing_and_the_own_values_after_a_fully_trained_module_moved(model):
    before = model.classifier.weight.detach().clone()
    delta = trained(model, train="classifier")
    wrap(model)
    assert torch.equal(dk.base_state_dict(model)["classifier.1.weight"], before)
    assert "fully trained" in repr(delta)
    assert "are not frozen, and are not saved" not in repr(delta)
