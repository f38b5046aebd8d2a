"""`active = False` gives the backbone's own outputs, also where modules are fully trained."""

import pytest
import torch

import deltakit as dk
from support.models import Transformer, attached, ids, same, snapshot


@pytest.fixture
def model():
    return Transformer().eval()


def trained(model, **options):
    delta = attached(model, dk.LoRA(r=2), train=["classifier", "norm"], **options)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    return delta


def test_fully_trained_modules_are_switched_off_too(model, tmp_path):
    before, bare = snapshot(model), model(ids())
    delta = trained(model)
    on, values = model(ids()), {name: value.clone() for name, value in delta.state_dict().items()}
    assert not torch.equal(on, bare)
    delta.active = False
    assert torch.equal(model(ids()), bare)
    assert delta.attached
    assert delta.trainable
    assert delta.fully_trained
    assert all(torch.equal(value, values[name]) for name, value in delta.state_dict().items())
    delta.save(tmp_path)
    torch.testing.assert_close(dk.base_state_dict(model), before["values"], rtol=0, atol=0)
    delta.active = True
    assert torch.equal(model(ids()), on)
    twin = Transformer().eval()
    twin.load_state_dict(before["values"])
    dk.load(tmp_path, twin)
    assert torch.equal(twin(ids()), on)
    for step in (lambda: setattr(delta, "active", False), delta.detach, delta.attach):
        step()
        assert torch.equal(model(ids()), bare)
    delta.active = True
    assert torch.equal(model(ids()), on)
    with delta.detached():
        assert torch.equal(model(ids()), bare)
        delta.active = False
    assert torch.equal(model(ids()), bare)
    delta.active = True
    assert torch.equal(model(ids()), on)
    delta.detach()
    same(before, snapshot(model))


def test_training_goes_on_where_it_was(model):
    delta = trained(model)
    optimizer = torch.optim.SGD(delta.parameters(), 0.1)
    delta.active = False
    assert not model.classifier.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in (model.classifier.weight, model.norm.weight))
    delta.active = True
    assert model.classifier.weight.requires_grad
    before = delta.state_dict()["classifier.weight"].clone()
    model(ids()).sum().backward()
    optimizer.step()
    assert not torch.equal(delta.state_dict()["classifier.weight"], before)


def test_freezing_and_loading_while_it_is_off(model):
    before, bare = snapshot(model), model(ids())
    delta = trained(model)
    delta.active = False
    delta.freeze(train="embed")
    delta.load_state_dict({name: value + 1 for name, value in delta.state_dict().items()})
    assert torch.equal(model(ids()), bare)
    delta.active = True
    assert not torch.equal(model(ids()), bare)
    assert torch.equal(model.embed.weight, before["values"]["embed.weight"] + 1)
    delta.detach()
    same(before, snapshot(model))


class TestLoadingTheBackbone:
    """Values of the backbone that are loaded while a delta keeps the old ones would be lost at detach."""

    MESSAGE = r"classifier\.bias: delta 'delta' fully trains this tensor, .*; detach\(\) the delta before loading"

    @pytest.mark.parametrize("part", ["", "classifier"])
    def test_it_is_refused(self, model, part):
        base = {name: value.clone() for name, value in model.state_dict().items()}
        delta = trained(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        module = model.get_submodule(part)
        inside = {name.removeprefix(f"{part}."): value + 1 for name, value in base.items() if name.startswith(part)}
        with pytest.raises(
            dk.StateError, match=self.MESSAGE if not part else "bias: delta 'delta' fully trains this tensor"
        ):
            module.load_state_dict(inside)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        # What the error advises.
        delta.detach()
        module.load_state_dict(inside)
        delta.attach()
        delta.detach()
        torch.testing.assert_close(dict(module.state_dict()), inside, rtol=0, atol=0)
        assert not any(m._load_state_dict_pre_hooks for m in model.modules())

    def test_under_another_name(self, model):
        trained(model)
        outer = torch.nn.ModuleDict({"inner": model})
        state = {f"inner.{name}": value for name, value in dk.base_state_dict(model).items()}
        with pytest.raises(dk.StateError, match=r"inner\.classifier\.bias: delta 'delta' fully trains"):
            outer.load_state_dict(state)

    def test_a_checkpoint_with_the_delta_is_loaded(self, model):
        """Training frameworks save and load all of `model.state_dict()`."""
        delta = trained(model)
        output = model(ids())
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.zero_()
        model.load_state_dict(state)
        assert torch.equal(model(ids()), output)

    def test_it_is_allowed_where_nothing_is_kept(self, model):
        base = {name: value + 1 for name, value in model.state_dict().items()}
        delta = trained(model)
        delta.active = False
        model.load_state_dict(base)
        delta.active = True
        delta.detach()
        torch.testing.assert_close(dict(model.state_dict()), base, rtol=0, atol=0)

    def test_a_part_of_a_merged_model(self, model):
        delta = attached(model, dk.LoRA(r=2)).merge()
        layer = model.layers[0].self_attn
        state = {name: value for name, value in layer.state_dict().items() if "delta" not in name}
        for module, names in ((layer, state), (layer.q_proj, {"weight": state["q_proj.weight"]})):
            with pytest.raises(dk.StateError, match="delta 'delta' is merged into this weight"):
                module.load_state_dict(names, strict=False)
        layer.k_proj.load_state_dict({"weight": state["k_proj.weight"]})
        delta.unmerge()
        layer.load_state_dict(state)


def test_a_delta_attached_under_inference_mode_is_trained(model):
    methods = (
        dk.LoRA(r=2),
        dk.Adapter(size=2),
        dk.Prefix(tokens=2, reparam=True),
        dk.SoftPrompt(tokens=2, prepend=False),
    )
    before, bare = snapshot(model), model(ids()).detach()
    with torch.inference_mode():
        delta = dk.attach(model, *methods, train="classifier")
        other = dk.combine(model, {dk.attach(model, dk.LoRA(r=3), name="one"): 0.5}).delta
        dk.deltas(model)[-1].detach()
    model.train()(ids()).sum().backward()
    torch.optim.SGD(delta.parameters(), 0.1).step()
    delta.load_state_dict({name: value + 1 for name, value in delta.state_dict().items()})
    with torch.inference_mode():
        delta.detach()
    delta.load_state_dict({name: value + 1 for name, value in delta.state_dict().items()})
    model.eval().zero_grad()
    same(before, snapshot(model))
    assert torch.equal(model(ids()), bare)
    other.attach()
    model.train()(ids()).sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_a_backbone_made_under_inference_mode():
    with torch.inference_mode():
        model = Transformer().eval()
    with pytest.raises(dk.StateError, match=r"train: classifier\.weight was made under torch\.inference_mode"):
        dk.attach(model, dk.LoRA(r=2), train="classifier")
    delta = attached(model, dk.LoRA(r=2))
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.is_inference())
    with torch.no_grad():
        model(ids())
    with pytest.raises(dk.StateError, match=r"embed\.weight: the backbone was made under torch\.inference_mode"):
        model(ids())
    delta.trainable = False
    model(ids())
    delta.trainable = True
    with pytest.raises(dk.StateError, match=r"this weight was made under torch\.inference_mode"):
        delta.merge()
    delta.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_while_merged_is_a_warning(model):
    delta = attached(model, dk.LoRA(r=2), train="classifier").merge()
    model(ids())
    model.train()
    with torch.no_grad():
        model(ids())
    with pytest.warns(dk.DeltaWarning, match=r"'delta' is merged into the weights, .*; unmerge\(\) it before training"):
        model(ids())
    model(ids())
    delta.unmerge()
    model(ids())
    delta.merge()
    delta.trainable = False
    model(ids())


def test_the_order_is_that_of_the_first_attachment(model, tmp_path):
    attached(model, dk.Adapter(size=3, at="@attn.o")).save(tmp_path)
    dk.deltas(model)[0].detach()
    later = dk.load(tmp_path, model, name="later", attach=False)
    attached(model, dk.Adapter(size=2, at="@attn.o"), name="first")
    later.attach()
    assert [delta.name for delta in dk.deltas(model)] == ["first", "later"]
    output = model(ids())
    dk.deltas(model)[0].detach().attach()
    later.detach().attach()
    assert [delta.name for delta in dk.deltas(model)] == ["first", "later"]
    assert torch.equal(model(ids()), output)


def test_a_state_dict_of_an_inactive_delta_warns_of_what_it_lacks(model):
    delta = trained(model)
    kept = model.classifier.weight.detach().clone()
    model.state_dict()
    delta.active = False
    with pytest.warns(dk.DeltaWarning, match=r"own values of classifier.bias and \d+ more, and not .* delta 'delta'"):
        state = model.state_dict()
    assert not torch.equal(state["classifier.weight"], kept)
    # What the warning advises warns no more.
    dk.base_state_dict(model)
    delta.active = True
    assert torch.equal(model.state_dict()["classifier.weight"], kept)
    delta.active = False
    delta.detach()
    model.state_dict()


def test_a_state_dict_of_an_active_delta_is_not_loaded_into_an_inactive_one(model):
    delta = trained(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    own = dk.base_state_dict(model)
    delta.active = False
    with pytest.raises(dk.StateError, match=r"classifier.bias: delta 'delta' .* is not active, .*set active = True"):
        model.load_state_dict(state)
    torch.testing.assert_close(dk.base_state_dict(model), own, rtol=0, atol=0)
    # Both ways that the error advises.
    model.load_state_dict({name: value for name, value in state.items() if name in own}, strict=True)
    assert torch.equal(model.classifier.weight, state["classifier.weight"])
    model.load_state_dict(own)
    delta.active = True
    model.load_state_dict(state)
    assert torch.equal(model.classifier.weight, state["classifier.weight"])


def test_a_state_dict_from_an_inactive_delta_loads_into_an_inactive_one(model):
    delta = trained(model)
    delta.active = False
    with pytest.warns(dk.DeltaWarning, match="not active"):
        state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    delta.active = True
    delta.detach()
    assert torch.equal(model.classifier.weight, state["classifier.weight"])
