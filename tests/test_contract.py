"""What every method promises, held against each registered one: a new method is tested by being there."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import (
    STYLES,
    WITHOUT_PARAMETERS,
    Calls,
    Transformer,
    beside,
    ids,
    method_of,
    randomize,
    same,
    snapshot,
)

ALL = sorted(dk.METHODS)
IDENTITY = [name for name in ALL if dk.METHODS[name].identity]
ON_OUTPUTS = [name for name in ALL if method_of(name).positions()]

every_method = pytest.mark.parametrize("name", ALL)
every_trained_method = pytest.mark.parametrize("name", sorted({*ALL} - WITHOUT_PARAMETERS))


@pytest.fixture
def model(name):
    return beside(Transformer().eval(), method_of(name))


def trained(model, name):
    delta = dk.attach(model, method_of(name))
    randomize(delta)
    return delta


@pytest.mark.parametrize("name", IDENTITY)
def test_attached_and_untrained_is_the_identity(model, name):
    before = model(ids())
    dk.attach(model, method_of(name))
    assert torch.equal(model(ids()), before)


@every_trained_method
def test_all_parameters_get_gradients_and_nothing_else_does(model, name):
    before = model(ids())
    delta = trained(model, name)
    out = model(ids())
    assert not torch.allclose(out, before)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    mine = {id(parameter) for parameter in delta.parameters()}
    assert mine == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)


@every_method
def test_detach_is_exact(model, name):
    model.classifier.bias.requires_grad_(False)
    before, output = snapshot(model), model(ids())
    delta = trained(model, name)
    model(ids())
    delta.detach()
    same(before, snapshot(model))
    assert torch.equal(model(ids()), output)


@every_method
def test_detach_twice_is_one_detach_and_attach_twice_is_an_error(model, name):
    delta = trained(model, name)
    before = snapshot(model)
    with pytest.raises(dk.StateError, match="attached already; detach"):
        delta.attach()
    same(before, snapshot(model))
    assert delta.detach().detach() is delta


@every_method
def test_attach_again_gives_the_same_outputs(model, name):
    delta = trained(model, name)
    output = model(ids())
    assert torch.equal(delta.detach().attach().backbone(ids()), output)


@every_method
def test_detached_restores_after_an_exception(model, name):
    before = model(ids())
    delta = trained(model, name)
    output = model(ids())
    with pytest.raises(RuntimeError, match="inside"), delta.detached() as bare:
        assert torch.equal(bare(ids()), before)
        raise RuntimeError("inside")
    assert torch.equal(model(ids()), output)


@every_method
def test_attached_active_and_trainable_are_independent(model, name):
    before = model(ids())
    delta = trained(model, name)
    output = model(ids())
    delta.active = False
    assert torch.equal(model(ids()), before)
    assert (delta.attached, delta.active, delta.trainable) == (True, False, True)
    delta.trainable = False
    assert not any(parameter.requires_grad for parameter in model.parameters())
    delta.detach().attach()
    assert (delta.attached, delta.active, delta.trainable) == (True, False, False)
    delta.active = True
    assert torch.equal(model(ids()), output)
    delta.trainable = True
    assert all(parameter.requires_grad for parameter in delta.parameters())


@every_trained_method
def test_deepcopy_is_independent_both_ways(model, name):
    delta = trained(model, name)
    output = model(ids())
    twin = copy.deepcopy(model)
    *_, twin_delta = dk.deltas(twin)
    randomize(delta)
    assert torch.equal(twin(ids()), output)
    changed = model(ids())
    randomize(twin_delta)
    assert torch.equal(model(ids()), changed)
    assert not torch.equal(twin(ids()), output)
    twin_delta.detach()
    assert delta.attached
    assert len(dk.deltas(twin)) == len(dk.deltas(model)) - 1


@every_method
def test_pickle_and_torch_save(model, name):
    trained(model, name)
    output = model(ids())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(ids()), output)
        *_, delta = dk.deltas(twin)
        delta.detach()
        assert not torch.equal(twin(ids()), output)


@every_method
def test_save_and_load_onto_a_fresh_backbone(model, name, tmp_path):
    fresh = copy.deepcopy(model)
    delta = trained(model, name)
    delta.save(tmp_path)
    loaded = dk.load(tmp_path, fresh)
    assert torch.equal(fresh(ids()), model(ids()))
    assert loaded.state_dict().keys() == delta.state_dict().keys()
    again = loaded.save(tmp_path / "again")
    assert (again / "delta_model.safetensors").read_bytes() == (tmp_path / "delta_model.safetensors").read_bytes()


@every_trained_method
def test_base_checkpoint_loads_strictly_while_attached(model, name):
    base = copy.deepcopy(dk.base_state_dict(model))
    keys = set(base)
    delta = trained(model, name)
    output = model(ids())
    assert set(dk.base_state_dict(model)) == keys
    assert keys < set(model.state_dict())
    model.load_state_dict(base, strict=True)
    assert torch.equal(model(ids()), output)
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    randomize(delta)
    model.load_state_dict(whole, strict=True)
    assert torch.equal(model(ids()), output)
    del whole[next(key for key in whole if key not in keys)]
    if len(whole) > len(keys):
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(whole, strict=True)


@every_method
def test_a_second_delta_never_enters_the_first(model, name):
    dk.attach(model, method_of(name))
    inner = {id(module) for module in model.modules() if isinstance(module, dk.DeltaModule)}
    inside = {id(child) for m in model.modules() if id(m) in inner for child in m.modules()}
    assert inside.isdisjoint(id(module) for module in dk.select(model, "**").values())
    dk.attach(model, dk.LoRA(at="**", of=nn.Linear, r=3), name="second")
    assert not any(
        isinstance(child, dk.DeltaModule) for m in model.modules() if id(m) in inside for child in m.children()
    )


@every_method
def test_attach_twice_at_one_place_says_so(model, name):
    dk.attach(model, method_of(name))
    before = snapshot(model)
    with pytest.raises(dk.StateError, match="detach"):
        dk.attach(model, method_of(name))
    same(before, snapshot(model))


@every_method
@pytest.mark.parametrize("at", ["nothing_like_it", ["classifier", "nothing_like_it"]])
def test_a_selector_that_misses_changes_nothing(model, name, at):
    before = snapshot(model)
    with pytest.raises(dk.SelectorError, match=r"'nothing_like_it' matches none of the \d+ modules of Transformer"):
        dk.attach(model, method_of(name, at=at))
    same(before, snapshot(model))


@every_method
def test_a_failure_after_building_changes_nothing(model, name):
    before = snapshot(model)
    with pytest.raises(dk.OptionError, match="without dots, spaces and control characters"):
        dk.attach(model, method_of(name), name="a.b")
    with pytest.raises(dk.SelectorError, match="nowhere"):
        dk.attach(model, method_of(name), train="nowhere")
    same(before, snapshot(model))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ON_OUTPUTS)
def test_every_way_of_calling_and_returning(name, style):
    # Pairs need an even number of features.
    model = Calls(style, d_out=6 if name == "road" else 5)
    x = torch.randn(2, 3, 7)
    before = model(x)
    # Sizes and divisors that fit a layer of 7 to 5 features.
    options = {"compacter": {"division": 5}, "gralora": {"k": 1}, "vblora": {"length": 1}}
    delta = dk.attach(model, method_of(name, at="target", **options.get(name, {})))
    assert not dk.METHODS[name].identity or torch.equal(model(x), before)
    reads_call = any(module.reads_call for (module,) in delta.modules.values())
    # Called alone, the target knows nothing about the call of the whole model.
    kind = None if reads_call else type(model.target(x))
    randomize(delta)
    assert not torch.equal(model(x), before)
    assert reads_call or type(model.target(x)) is kind
    delta.detach()
    assert torch.equal(model(x), before)


@every_trained_method
def test_dtype_follows_the_backbone(model, name):
    model = model.to(torch.bfloat16)
    delta = dk.attach(model, method_of(name))
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.bfloat16}
    assert model(ids()).dtype == torch.bfloat16
    model.to(torch.float64)
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.float64}
    assert model(ids()).dtype == torch.float64


@every_method
def test_meta_backbones(name):
    with torch.device("meta"):
        model = beside(Transformer(), method_of(name))
    delta = dk.attach(model, method_of(name))
    assert all(parameter.is_meta for parameter in delta.parameters())
    assert name in repr(delta)
    delta.detach()


@every_method
def test_round_trip_as_plain_data(name):
    one = method_of(name, at=["a", "b"], of=nn.Linear, exclude="c")
    data = one.to_dict()
    assert type(one).from_dict(data).to_dict() == data
    with pytest.raises(dk.CheckpointError, match="no option not_an_option"):
        dk.Method.from_dict({**data, "not_an_option": 1})
    with pytest.raises(dk.CheckpointError, match="unknown method 'none'"):
        dk.Method.from_dict({**data, "method": "none"})


@every_method
def test_merge_is_the_delta_or_an_error(model, name):
    before = snapshot(model)
    delta = trained(model, name)
    output = model(ids())
    try:
        delta.merge()
    except dk.TargetError as error:
        assert "leave the delta attached" in str(error)
        assert torch.equal(model(ids()), output)
        return
    torch.testing.assert_close(model(ids()), output, rtol=1e-4, atol=1e-5)
    with pytest.raises(dk.StateError, match="not merged"):
        delta.merge()
    with pytest.raises(dk.StateError, match="merged into the weights"):
        delta.active = False
    assert torch.equal(delta.unmerge().backbone(ids()), output)
    delta.merge().detach()
    same(before, snapshot(model))


@every_trained_method
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(model, name, reentrant):
    delta = trained(model, name)
    model.train()
    # Some drop values.
    torch.manual_seed(2)
    model(ids()).square().sum().backward()
    expected = [parameter.grad for parameter in delta.parameters()]
    for parameter in delta.parameters():
        parameter.grad = None
    for layer in model.layers:
        plain = layer.forward

        def forward(x, plain=plain):
            x = x if x.requires_grad or not reentrant else x.requires_grad_()
            return torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=reentrant)

        layer.forward = forward
    torch.manual_seed(2)
    model(ids()).square().sum().backward()
    for parameter, gradient in zip(delta.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
