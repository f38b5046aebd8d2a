"""The handle: what is trained, frozen and restored, alone and with several deltas in any order of calls."""

import copy
import json

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deltakit as dk
from support.models import Transformer, attached, ids, randomize, same, snapshot
from support.tiny_transformers import build


@pytest.fixture
def model():
    return Transformer().eval()


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freezing_is_undone_as_the_user_had_it(model):
    model.layers[0].requires_grad_(False)
    before = trainable(model)
    delta = dk.attach(model, dk.LoRA(r=3))
    assert trainable(model) == {name for name in trainable(model) if "delta_lora" in name}
    delta.detach()
    assert trainable(model) == before


def test_freeze_false_leaves_the_backbone_alone(model):
    before = trainable(model)
    delta = dk.attach(model, dk.LoRA(r=3), freeze=False)
    assert before < trainable(model)
    delta.freeze(train="@head")
    assert {name for name in trainable(model) if "lora" not in name} == {"classifier.weight", "classifier.bias"}
    assert delta.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    delta.detach()
    assert trainable(model) == before
    with pytest.raises(dk.StateError, match="is not attached: attach"):
        delta.freeze()


def test_what_the_user_unfreezes_stays_the_user_s(model):
    delta = dk.attach(model, dk.LoRA(r=3))
    model.norm.requires_grad_(True)
    other = dk.attach(model, dk.BitFit())
    delta.detach()
    assert "norm.weight" not in trainable(model)
    other.detach()
    assert "norm.weight" in trainable(model)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("had", [True, False])
def test_a_flag_that_the_user_changed_stays_as_the_user_set_it(model, freeze, had):
    """Whatever refreshes the flags in between, the last detach must not put back what was there before the user's change."""
    model.norm.requires_grad_(had)
    delta = dk.attach(model, dk.LoRA(r=3), freeze=freeze)
    other = dk.attach(model, dk.BitFit(), train="norm", freeze=False)
    other.detach()
    model.norm.weight.requires_grad_(not model.norm.weight.requires_grad)
    wanted = model.norm.weight.requires_grad
    delta.trainable = False
    delta.detach()
    assert model.norm.weight.requires_grad is wanted
    assert model.norm.bias.requires_grad is had


def test_two_deltas_share_one_freezing(model):
    before = trainable(model)
    one, two = dk.attach(model, dk.LoRA(r=3), train="@head"), dk.attach(model, dk.BitFit())
    assert "classifier.weight" in trainable(model)
    one.detach()
    assert trainable(model) == {name for name, _ in model.named_parameters() if "bitfit" in name}
    two.detach()
    assert trainable(model) == before


def test_a_fully_trained_head_belongs_to_the_delta(model, tmp_path):
    fresh, before, output = copy.deepcopy(model), snapshot(model), model(ids())
    delta = dk.attach(model, dk.LoRA(r=3), train="@head")
    assert torch.equal(model(ids()), output)
    randomize(delta)
    trained = model(ids())
    assert "fully trained" in repr(delta)
    assert "classifier.{weight,bias}" in repr(delta)
    delta.detach()
    same(before, snapshot(model))
    assert delta.num_parameters == sum(value.numel() for value in delta.state_dict().values())
    delta.save(tmp_path)
    dk.load(tmp_path, fresh)
    assert torch.equal(fresh(ids()), trained)
    assert torch.equal(delta.attach().backbone(ids()), trained)
    delta.trainable = False
    assert not trainable(model)


def test_training_what_is_tied_is_an_error(model):
    model.tied = nn.Linear(20, 31, bias=False)
    model.tied.weight = model.embed.weight
    before = snapshot(model)
    with pytest.raises(dk.StateError, match=r"tied\.weight is tied to embed\.weight, which would be trained with it"):
        dk.attach(model, dk.LoRA(r=3), train="tied")
    same(before, snapshot(model))
    dk.attach(model, dk.LoRA(r=3), train=["tied", "embed"])
    with pytest.raises(dk.StateError, match=r"train: no parameters in act"):
        dk.attach(nn.ModuleDict({"act": nn.ReLU(), "q": nn.Linear(3, 3)}), dk.LoRA(r=1, at="q"), train="act")


def test_two_deltas_cannot_train_one_head(model):
    one = dk.attach(model, dk.LoRA(r=3), train="@head")
    before = snapshot(model)
    with pytest.raises(dk.StateError, match=r"classifier\.bias: delta 'delta' fully trains it already; detach"):
        dk.attach(model, dk.BitFit(), train="@head")
    same(before, snapshot(model))
    one.detach()
    dk.attach(model, dk.BitFit(), train="@head")


def test_deltas_are_not_nested(model):
    delta = dk.attach(model, dk.Adapter(size=3))
    with pytest.raises(dk.SelectorError, match=r"'delta_adapter\.down' matches none"):
        dk.attach(model, dk.LoRA(r=2, at="delta_adapter.down"), name="inner")
    with pytest.raises(dk.TargetError, match="the backbone is itself a delta module"):
        dk.attach(model.layers[0].mlp.down_proj.delta_adapter, dk.LoRA(r=2, at="down"))
    merged = dk.attach(model, dk.LoRA(r=3)).merge()
    with pytest.raises(
        dk.StateError, match=r"is merged into the weights: unmerge\(\) it before loading tensors into it"
    ):
        merged.load_state_dict(merged.state_dict())
    assert delta.attached


def test_several_methods_in_one_delta(model, tmp_path):
    fresh = copy.deepcopy(model)
    delta = dk.attach(model, dk.LoRA(r=3), dk.BitFit(), dk.Prefix(tokens=2), dk.LoRA(r=2, at="@ff.up"))
    randomize(delta)
    assert {name.split(".")[-2] for name in delta.state_dict()} == {"lora", "bitfit", "prefix", "lora_2"}
    delta.save(tmp_path)
    dk.load(tmp_path, fresh)
    assert torch.equal(fresh(ids()), model(ids()))


def test_order_is_that_of_first_attachment(model):
    one = dk.attach(model, dk.Adapter(size=3, at="@attn.o", activation="relu"), name="one")
    two = dk.attach(model, dk.Adapter(size=5, at="@attn.o", activation="tanh"), name="two")
    randomize(one)
    randomize(two)
    output = model(ids())
    one.detach()
    two.detach()
    two.attach()
    one.attach()
    assert torch.equal(model(ids()), output)
    assert [delta.name for delta in dk.deltas(model)] == ["one", "two"]


def test_the_first_attached_comes_first():
    layer = nn.Linear(7, 5)
    model, x = nn.ModuleDict({"layer": layer}), torch.randn(2, 7)
    plain = layer(x)
    for name, activation in (("one", "relu"), ("two", "tanh")):
        randomize(dk.attach(model, dk.Adapter(size=3, at="layer", activation=activation), name=name))
    torch.testing.assert_close(layer(x), layer.two_adapter(x, layer.one_adapter(x, plain)))


def test_order_does_not_need_a_clock_that_moves(model, monkeypatch):
    """Two deltas that are attached in one tick would change places when the first one comes back."""
    monkeypatch.setattr("deltakit.delta.claims.time.time_ns", lambda: 7)
    made = [randomize(dk.attach(model, dk.Adapter(size=size, at="@attn.o"), name=f"by_{size}")) for size in (3, 5)]
    output = model(ids())
    made[0].detach().attach()
    assert torch.equal(model(ids()), output)


def test_freezing_twice_keeps_the_backbone_s_own_values(model):
    """What is trained already is not the backbone's own any more."""
    before = snapshot(model)
    delta = dk.attach(model, dk.LoRA(r=3)).freeze(train="norm")
    randomize(delta)
    delta.freeze(train=["norm", "classifier"])
    delta.detach()
    same(before, snapshot(model))


def test_a_delta_that_is_not_trainable_holds_what_it_trained_fully(model):
    """Also where it leaves the rest of the backbone as it is."""
    delta = dk.attach(model, dk.LoRA(r=3), train="norm", freeze=False)
    delta.trainable = False
    assert not model.norm.weight.requires_grad
    assert model.classifier.weight.requires_grad
    delta.trainable = True
    assert model.norm.weight.requires_grad


def test_order_holds_between_deltas_that_were_never_together(model):
    one = dk.attach(model, dk.Adapter(size=3, at="@attn.o"), name="one").detach()
    two = dk.attach(model, dk.Adapter(size=5, at="@attn.o"), name="two")
    randomize(one)
    randomize(two)
    first = one.attach().backbone(ids())
    two.detach()
    two.attach()
    assert torch.equal(model(ids()), first)
    assert [delta.methods[0].size for delta in dk.deltas(model)] == [3, 5]


def test_names(model):
    dk.attach(model, dk.LoRA(r=3), name="mine")
    with pytest.raises(dk.StateError, match="a delta named 'mine' is attached already"):
        dk.attach(model, dk.BitFit(), name="mine")
    assert [dk.attach(model, dk.BitFit()).name, dk.attach(model, dk.Prefix()).name] == ["delta", "delta_2"]
    model.layers[0].self_attn.q_proj.x_lora = 1
    with pytest.raises(dk.StateError, match="q_proj: it has an attribute 'x_lora' of its own"):
        dk.attach(model, dk.LoRA(r=3), name="x")


def test_an_automatic_name_gives_way_when_it_comes_back(model):
    one = dk.attach(model, dk.LoRA(r=3)).detach()
    two = dk.attach(model, dk.BitFit())
    assert (two.name, one.attach().name) == ("delta", "delta_2")


def test_plan_changes_nothing_and_says_what_would_be(model):
    before = snapshot(model)
    planned = dk.plan(model, dk.LoRA(r=3), dk.Prefix(tokens=2), train="@head")
    same(before, snapshot(model))
    assert planned.paths["lora"] == [f"layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    delta = dk.attach(model, dk.LoRA(r=3), dk.Prefix(tokens=2))
    assert planned.num_parameters == delta.num_parameters
    assert "layers.{0-1}.self_attn.{q_proj,v_proj}" in repr(planned)
    assert "nothing is changed; +" in repr(planned)


def test_repr_says_what_is_where(model):
    delta = dk.attach(model, dk.LoRA(r=3))
    total = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
    assert repr(delta).splitlines() == [
        "delta 'delta' on Transformer: attached, active, trainable",
        "  lora r=3 alpha=16                   4 targets  +480",
        "      layers.{0-1}.self_attn.{q_proj,v_proj}",
        f"480 parameters, {100 * 480 / total:.3g} % of the backbone's {total:,}",
    ]
    delta.merge()
    assert repr(delta).startswith("delta 'delta' on Transformer: attached, active, trainable, merged")
    with delta.detached():
        assert "not attached" in repr(delta)
    assert delta.merged


def test_a_shared_module_is_attached_once_and_counted_once(model):
    model.again = model.layers[0].self_attn
    delta = dk.attach(model, dk.LoRA(r=3, at="again.q_proj"))
    assert list(delta.modules) == ["layers.0.self_attn.q_proj"]
    assert "again.q_proj  the same instances" in repr(delta)
    assert "again (SelfAttention) → layers.0.self_attn" in str(dk.show(model))


def test_one_method_twice_at_one_place_needs_two_deltas(model):
    with pytest.raises(dk.OptionError, match=r"layers\.0\.self_attn\.q_proj: two of the given methods are lora"):
        dk.attach(model, dk.LoRA(r=2), dk.LoRA(r=3, at="**.q_proj"))
    first = dk.attach(model, dk.LoRA(r=2))
    with pytest.raises(dk.StateError, match=r"delta 'delta' has a lora there already; .* name="):
        dk.attach(model, dk.LoRA(r=3))
    second = dk.attach(model, dk.LoRA(r=3), name="second")
    assert [delta.name for delta in dk.deltas(model)] == [first.name, second.name]


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(["attach", "detach", "off", "on", "save", "merge", "forward", "copy"])
    ),
    max_size=14,
)


@settings(max_examples=25)
@given(steps=STEPS)
def test_any_sequence_of_calls_is_undone_bit_exactly(steps, tmp_path_factory):
    torch.manual_seed(0)
    model = Transformer(blocks=1).eval()
    model.norm.requires_grad_(False)
    before, output = snapshot(model), model(ids())
    methods = (dk.LoRA(r=3), dk.Adapter(size=2), dk.Prefix(tokens=2))
    deltas = [dk.attach(model, m, train="@head" if i == 1 else ()) for i, m in enumerate(methods)]
    for delta in deltas:
        randomize(delta)
    states = [{name: value.clone() for name, value in delta.state_dict().items()} for delta in deltas]
    for which, step in steps:
        delta = deltas[which]
        if step == "attach" and not delta.attached:
            delta.attach()
        elif step == "detach":
            delta.detach()
        elif step in ("off", "on") and not delta.merged:
            delta.active = step == "on"
        elif step == "save":
            folder = tmp_path_factory.mktemp("delta")
            delta.save(folder)
            if not delta.merged:
                delta.load_state_dict(states[which])
        elif step == "merge" and which == 0 and delta.attached and delta.active and not delta.merged:
            delta.merge()
        elif step == "forward":
            model(ids())
        elif step == "copy":
            assert torch.equal(copy.deepcopy(model)(ids()), model(ids()))
        if not any(d.attached and d.active for d in deltas[:1] + deltas[2:]) and not deltas[1].attached:
            assert torch.equal(model(ids()), output)
    for delta, state in zip(deltas, states, strict=True):
        delta.detach()
        assert all(torch.equal(value, state[name]) for name, value in delta.state_dict().items())
    same(before, snapshot(model))
    assert torch.equal(model(ids()), output)


def test_tied_weights_that_are_fully_trained_come_and_go_exactly(tmp_path):
    model = build("gpt2", tf.AutoModelForCausalLM)
    weight = model.lm_head.weight
    assert weight is model.transformer.wte.weight
    base = weight.detach().clone()
    delta = dk.attach(model, dk.LoRA(r=2), train=["wte", "lm_head"])
    with torch.no_grad():
        weight.add_(1)
        next(iter(delta.modules_of("lora").values()))[0].B.add_(1)
    delta.save(tmp_path)
    for _ in range(2):
        delta.detach()
        assert torch.equal(weight, base)
        delta.attach()
        assert torch.equal(weight, base + 1)
    delta.detach()
    dk.load(tmp_path, model).detach()
    assert torch.equal(weight, base)


def test_a_module_with_two_names_is_fully_trained_by_either(model):
    model.again = model.layers[1].norm_1
    delta = dk.attach(model, dk.LoRA(r=2), train="layers.1.norm_1")
    assert model.again.weight.requires_grad
    delta.detach()


def test_the_base_state_dict_has_the_backbone_s_own_values_of_what_is_fully_trained(model):
    """With the trained values, a checkpoint of the base model would hold the head of one task."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dk.attach(model, dk.LoRA(r=2), train="classifier")
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    same = dk.base_state_dict(model)
    assert same.keys() == before.keys()
    assert all(torch.equal(same[name], value) for name, value in before.items())


def test_a_detached_delta_stays_detached_behind_a_block(model):
    delta = dk.attach(model, dk.LoRA(r=2)).detach()
    with delta.detached():
        assert not delta.attached
    assert not delta.attached


def test_the_whole_backbone_is_trained_by_its_root():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    delta = dk.attach(model, dk.LoRA(r=2, at="0"), train="^")
    wanted = {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert wanted <= delta.state_dict().keys()


def test_what_is_trained_adds_up(model, tmp_path):
    delta = attached(model, dk.LoRA(r=2), train="classifier")
    delta.freeze(train="^norm").freeze()
    config = json.loads((delta.save(tmp_path) / "delta_config.json").read_text())
    assert config["train"]["selectors"] == ["classifier", "^norm"]
    assert {"classifier.weight", "classifier.bias", "norm.weight", "norm.bias"} <= delta.state_dict().keys()


def test_a_delta_freezes_while_it_is_attached_and_no_longer(model):
    """`freeze=False` is the user's word that the backbone is not to be frozen; what that means is printed."""
    own = sum(p.numel() for p in model.parameters())
    one = dk.attach(model, dk.LoRA(r=3), train="@head")
    two = dk.attach(model, dk.BitFit(), freeze=False)
    assert "not frozen" not in repr(one) + repr(two)
    one.detach()
    assert f"; {own:,} more of the backbone's are not frozen, and are not saved with the delta" in repr(two)
    assert "not frozen" not in repr(one)
    one.attach()
    assert "not frozen" not in repr(one) + repr(two)
    model.norm.requires_grad_(True)
    assert f"; {2 * 20} more of the backbone's are not frozen" in repr(one)
    two.freeze()
    one.detach()
    assert all("bitfit" in name for name in trainable(model))
