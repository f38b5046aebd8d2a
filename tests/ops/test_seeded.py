"""Frozen tensors from a seed: the same numbers everywhere, and in no file."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from deltakit.ops.seeded import Seeded, normal, seeded, uniform
from support.kind_methods import FrozenFactors, registered
from support.models import randomize

RECIPES = {"a": ((3, 5), normal(0.5)), "b": ((7, 2), uniform(0.1))}


@pytest.fixture(autouse=True)
def methods():
    with registered(FrozenFactors):
        yield


def shared(delta):
    return next(iter(delta.modules.values()))[0].shared


def two():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 11))


def test_the_numbers_of_a_seed_are_those_of_torch_s_generator():
    wanted = torch.empty(3, 5).normal_(0, 0.5, generator=torch.Generator().manual_seed(17))
    assert torch.equal(Seeded(17, RECIPES).a, wanted)
    other = torch.empty(7, 2).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(18))
    assert torch.equal(Seeded(17, RECIPES).b, other)
    assert not torch.equal(Seeded(19, RECIPES).a, wanted)


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    one = Seeded(17, RECIPES).a
    state = torch.get_rng_state()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = seeded((3, 5), 17, normal(0.5))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)
    model = nn.Sequential(nn.Linear(5, 7))
    torch.set_rng_state(state)
    dk.attach(model, FrozenFactors(at="0"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("at", ["0", "2", ["2", "0"]])
def test_any_set_of_targets_reads_the_same(at):
    everywhere = shared(dk.attach(two(), FrozenFactors(at=["0", "2"])))
    here = shared(dk.attach(two(), FrozenFactors(at=at)))
    assert torch.equal(here.A0, everywhere.A0)
    assert torch.equal(here.B0, everywhere.B0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_has_the_numbers_of_float32(dtype):
    wanted = Seeded(17, RECIPES)
    assert torch.equal(Seeded(17, RECIPES, dtype=dtype).a, wanted.a.to(dtype))
    assert torch.equal(Seeded(17, RECIPES).to(dtype).a, wanted.a.to(dtype))
    assert torch.equal(
        shared(dk.attach(two().to(dtype), FrozenFactors(at="0"))).A0,
        shared(dk.attach(two(), FrozenFactors(at="0"))).A0.to(dtype),
    )


def test_a_narrow_dtype_between_does_not_stay():
    wanted = Seeded(17, RECIPES).a
    assert torch.equal(Seeded(17, RECIPES).to(torch.bfloat16).to(torch.float32).a, wanted)
    assert torch.equal(Seeded(17, RECIPES, dtype=torch.bfloat16).double().a, wanted.double())


def test_a_default_dtype_or_device_changes_nothing():
    wanted = Seeded(17, RECIPES).a
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Seeded(17, RECIPES).a, wanted.double())
    finally:
        torch.set_default_dtype(torch.float32)


def test_behind_the_meta_device():
    with torch.device("meta"):
        model = two()
    delta = dk.attach(model, FrozenFactors(at=["0", "2"]))
    assert shared(delta).A0.is_meta
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    wanted = seeded((3, 97), 17, normal(0.5))
    assert torch.equal(shared(delta).A0, wanted)
    x = torch.randn(2, 5)
    (module,) = delta.modules["0"]
    product = 1.5 * module.b * ((x @ wanted[:, :5].T * module.d) @ shared(delta).B0[:7].T)
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias) + product)


def test_no_file_and_no_state_dict_holds_them(tmp_path):
    model = two()
    fresh = copy.deepcopy(model)
    delta = randomize(dk.attach(model, FrozenFactors(at=["0", "2"])))
    assert not [
        name for name in (*model.state_dict(), *delta.state_dict()) if "0." in name and name[-2:] in ("A0", "B0")
    ]
    assert {name.rpartition(".")[2] for name in delta.state_dict()} == {"b", "d"}
    delta.save(tmp_path)
    assert load_file(tmp_path / "delta_model.safetensors").keys() == delta.state_dict().keys()
    dk.load(tmp_path, fresh)
    x = torch.randn(2, 5)
    assert torch.equal(fresh(x), model(x))


def test_they_are_no_parameters():
    model = two()
    delta = dk.attach(model, FrozenFactors(at=["0", "2"]))
    assert delta.num_parameters == 7 + 3 + 11 + 3
    delta.trainable = True
    randomize(delta)
    model(torch.randn(2, 5)).sum().backward()
    assert not shared(delta).A0.requires_grad


def test_one_copy_for_all_targets():
    model = two()
    delta = dk.attach(model, FrozenFactors(at=["0", "2"]))
    assert len([name for name, _ in model.named_buffers() if name.endswith("A0")]) == 1
    assert len({id(m.shared.A0) for own in delta.modules.values() for m in own}) == 1


def test_copies_and_pickles():
    one = Seeded(17, RECIPES)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert torch.equal(twin.a, one.a)
        assert torch.equal(twin.double().b, one.b.double())
        assert not twin.state_dict()
