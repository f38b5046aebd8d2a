"""Buffers that forwards of a frozen backbone change: they go with the delta, and come back with it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import deltakit as dk
from support.models import randomize, same, snapshot


class Codebook(nn.Module):
    """A moving average that is changed in place, one that is replaced, one that no state dict has, and a growing cache."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(7))
        self.register_buffer("replaced", torch.ones(7))
        self.register_buffer("passing", torch.ones(7), persistent=False)
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.training:
            seen = x.detach().mean((0, 2, 3))
            self.average.mul_(0.9).add_(seen, alpha=0.1)
            self.replaced = self.replaced * 0.9 + seen * 0.1
            self.passing = self.passing * 0.9 + seen * 0.1
            self.cache = torch.zeros(len(self.cache) + 1)
        return x + (self.average + self.replaced + self.passing)[:, None, None]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)
        self.book = Codebook()
        self.conv2, self.bn2 = nn.Conv2d(7, 5, 3), nn.InstanceNorm2d(5, track_running_stats=True)
        self.fc = parametrizations.spectral_norm(nn.Linear(5, 2))

    def forward(self, x):
        x = self.bn2(self.conv2(torch.relu(self.book(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


STATISTICS = {
    "bn1.running_mean",
    "bn1.running_var",
    "bn1.num_batches_tracked",
    "bn2.running_mean",
    "bn2.running_var",
    "book.average",
    "book.replaced",
    "fc.parametrizations.weight.0._u",
    "fc.parametrizations.weight.0._v",
}


def x(seed=0):
    return torch.randn(3, 3, 11, 11, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.fixture
def model():
    return Net().eval()


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    assert not [name for name in found if not torch.equal(found[name], wanted[name])]


def step(model, seed=0):
    model.train()
    for number in range(3):
        model(x(seed + number)).sum().backward()
    model.zero_grad()
    return model.eval()


def attach(model, **options):
    return randomize(dk.attach(model, dk.LoRA(r=2, at=["conv1", "conv2"]), **options))


def test_statistics_go_and_come_back_with_the_delta(model):
    before, own, output = snapshot(model), buffers(model), model(x())
    delta = attach(model)
    assert "running statistics" not in repr(delta)
    assert delta.fully_trained == []
    step(model)
    trained, moved = model(x()), buffers(model)
    assert set(delta.fully_trained) == STATISTICS
    delta.detach()
    same(before, snapshot(model))
    equal(buffers(model), own)
    assert torch.equal(model(x()), output)
    assert set(delta.fully_trained) == STATISTICS
    delta.attach()
    equal(buffers(model), moved)
    assert torch.equal(model(x()), trained)
    with delta.detached():
        assert torch.equal(model(x()), output)
    assert torch.equal(model(x()), trained)


def test_statistics_are_saved_and_loaded(model, tmp_path):
    fresh = copy.deepcopy(model)
    # What no state dict has is in no file: neither here nor in torch's own.
    fresh.book.passing, output = model.book.passing, fresh(x())
    own = buffers(fresh)
    delta = attach(model)
    step(model)
    with torch.no_grad():
        model.book.passing.fill_(1)
    loaded = dk.load(delta.save(tmp_path / "one"), fresh)
    assert torch.equal(fresh(x()), model(x()))
    assert set(loaded.fully_trained) == STATISTICS
    assert set(loaded.state_dict()) == set(delta.state_dict())
    loaded.detach()
    equal(buffers(fresh), own)
    assert torch.equal(fresh(x()), output)


def test_the_printout_says_so(model):
    delta = attach(model, train="conv2")
    step(model)
    values = sum(value.numel() for name, value in model.named_buffers() if name in STATISTICS)
    text = repr(delta).splitlines()
    assert f"  {'running statistics':<32} {'':>12}   {values:,}" in text
    assert "      bn1.{running_mean,running_var,num_batches_tracked}" in text
    assert "      conv2.{weight,bias}" in text
    assert delta.num_parameters == sum(p.numel() for p in delta.parameters())
    delta.detach()
    assert repr(delta).splitlines()[1:] == text[1:]


def test_the_base_state_dict_has_the_backbone_s_own_statistics(model):
    own = {name: value.clone() for name, value in model.state_dict().items()}
    delta = attach(model)
    step(model)
    equal(dk.base_state_dict(model), own)
    assert not torch.equal(model.state_dict()["bn1.running_mean"], own["bn1.running_mean"])
    delta.detach()
    equal(dict(model.state_dict()), own)


def test_evaluation_moves_nothing(model):
    delta = attach(model)
    model(x())
    assert delta.fully_trained == []
    assert set(delta.state_dict()) == {f"conv{i}.lora.{factor}" for i in (1, 2) for factor in "AB"}


def test_statistics_that_are_no_numbers_have_not_moved():
    model = Net().eval()
    with torch.no_grad():
        model.bn1.running_mean[2] = torch.nan
    delta = attach(model)
    model(x())
    assert delta.fully_trained == []


def test_one_delta_has_the_statistics(model, tmp_path):
    before, own = snapshot(model), buffers(model)
    first, second = attach(model, name="first"), attach(model, name="second")
    first.trainable = False
    step(model)
    assert (first.fully_trained, set(second.fully_trained)) == ([], STATISTICS)
    first.detach()
    second.save(tmp_path)
    second.detach()
    equal(buffers(model), own)
    same(before, snapshot(model))
    # Each trained alone: two sets of statistics on the same buffers cannot be there at once.
    first.trainable = True
    first.attach()
    step(model, seed=7)
    for call in (second.attach, lambda: dk.load(tmp_path, model)):
        with pytest.raises(
            dk.StateError,
            match=r"bn1\.num_batches_tracked: delta 'first' has running statistics of its own there already; detach\(\)",
        ):
            call()
    with pytest.raises(dk.StateError, match="running statistics of its own there already"):
        attach(model, name="third", train="bn1")
    first.detach()
    second.attach()
    second.detach()
    equal(buffers(model), own)


def test_what_moved_before_the_second_delta_belongs_to_the_first(model):
    own = buffers(model)
    first = attach(model, name="first")
    step(model)
    first.trainable = False
    second = attach(model, name="second")
    step(model, seed=5)
    assert (set(first.fully_trained), second.fully_trained) == (STATISTICS, [])
    first.detach()
    equal(buffers(model), own)
    second.detach()


def test_statistics_of_a_backbone_that_is_trained_itself_stay(model):
    delta = attach(model, freeze=False)
    step(model)
    moved = buffers(model)
    assert delta.fully_trained == []
    delta.detach()
    equal(buffers(model), moved)
    other = attach(model)
    model.bn1.requires_grad_(True)
    step(model)
    assert not {name for name in other.fully_trained if name.startswith("bn1")}
    assert torch.equal(dk.base_state_dict(model)["bn1.running_mean"], model.bn1.running_mean)


def test_fully_trained_layers_keep_their_statistics(model):
    own = buffers(model)
    delta = attach(model, train="bn1")
    step(model)
    assert set(delta.fully_trained) == STATISTICS | {"bn1.weight", "bn1.bias"}
    delta.detach()
    equal(buffers(model), own)
    delta.attach()
    delta.freeze(train=["bn1", "bn2", "book"])
    step(model)
    delta.detach()
    equal(buffers(model), own)


def test_loading_a_state_dict_with_other_statistics(model):
    """One of before the training, one of after it, into a delta that has moved and into one that has not."""
    own, fresh = buffers(model), copy.deepcopy(model)
    delta = attach(model)
    start = {name: value.clone() for name, value in delta.state_dict().items()}
    step(model)
    with torch.no_grad():
        model.book.passing.fill_(1)
    trained, output = delta.state_dict(), model(x())
    other = attach(fresh)
    other.load_state_dict(trained)
    assert torch.equal(fresh(x()), output)
    assert set(other.fully_trained) == STATISTICS
    with pytest.raises(dk.CheckpointError, match="conv1.lora.A is missing"):
        delta.load_state_dict({name: value for name, value in start.items() if name != "conv1.lora.A"})
    assert set(delta.fully_trained) == STATISTICS
    delta.load_state_dict(start)
    assert delta.fully_trained == []
    for one in (delta, other):
        one.detach()
        equal(
            {name: value for name, value in buffers(one.backbone).items() if name in STATISTICS},
            {name: own[name] for name in STATISTICS},
        )
    other.load_state_dict(start | {name: trained[name] for name in STATISTICS})
    assert torch.equal(other.state_dict()["bn1.running_mean"], trained["bn1.running_mean"])
    with pytest.raises(dk.CheckpointError, match="conv1.lora.X is unknown"):
        other.load_state_dict(start | {"conv1.lora.X": torch.zeros(1)})


def test_a_base_checkpoint_that_is_loaded_stays(model):
    """Detaching must not put the old statistics back over it."""
    delta = attach(model)
    base = {name: value + 1 for name, value in Net().state_dict().items()}
    model.load_state_dict(base)
    assert delta.fully_trained == []
    delta.detach()
    equal(dict(model.state_dict()), base)


def test_a_base_checkpoint_does_not_replace_what_a_delta_moved(model):
    delta = attach(model)
    moved = buffers(step(model))
    base = {name: value + 1 for name, value in Net().state_dict().items()}
    with pytest.raises(
        dk.StateError, match=r"bn1\.num_batches_tracked: delta 'delta' has running statistics .* detach\(\)"
    ):
        model.load_state_dict(base)
    equal(buffers(model), moved)
    delta.detach()
    model.load_state_dict(base)
    delta.attach()
    assert all(torch.equal(buffers(model)[name], moved[name]) for name in STATISTICS)
    delta.detach()
    equal(dict(model.state_dict()), base)


def part_of(state, name):
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("part", ["bn1", "book", "fc", "fc.parametrizations"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_base_checkpoint_of_a_part_that_is_loaded_stays(model, part, copied):
    delta = attach(model)
    model = copy.deepcopy(model) if copied else model
    own = buffers(model)
    model.get_submodule(part).load_state_dict(part_of({k: v + 1 for k, v in Net().state_dict().items()}, part))
    loaded = buffers(model)
    step(model)
    (delta,) = dk.deltas(model)
    assert set(delta.fully_trained) == STATISTICS
    delta.detach()
    equal(buffers(model), loaded)
    assert not all(torch.equal(own[name], loaded[name]) for name in own)


@pytest.mark.parametrize("part", ["bn1", "book", "fc", "fc.parametrizations"])
@pytest.mark.parametrize("noticed", [False, True])
def test_a_base_checkpoint_of_a_part_does_not_replace_what_a_delta_moved(model, part, noticed):
    delta = attach(model)
    moved = buffers(step(model))
    assert not noticed or delta.fully_trained
    state = part_of({k: v + 1 for k, v in Net().state_dict().items()}, part)
    with pytest.raises(dk.StateError, match=r": delta 'delta' has running statistics .* detach\(\)"):
        model.get_submodule(part).load_state_dict(state)
    equal(buffers(model), moved)
    delta.detach()
    model.get_submodule(part).load_state_dict(state)


def test_a_part_that_the_user_trains_may_be_loaded(model):
    """Its statistics are the backbone's own, whether they have moved or not."""
    delta = attach(model, freeze=False)
    step(model)
    model.book.load_state_dict({"average": torch.ones(7), "replaced": torch.ones(7)})
    model.bn1.load_state_dict(part_of(Net().state_dict(), "bn1"))
    loaded = buffers(model)
    assert delta.fully_trained == []
    delta.detach()
    equal(buffers(model), loaded)


def test_a_delta_that_is_off_leaves_the_backbone_its_own(model):
    own, output = buffers(model), model(x())
    delta = attach(model)
    moved, trained = buffers(step(model)), model(x())
    delta.active = False
    equal(buffers(model), own)
    assert torch.equal(model(x()), output)
    assert set(delta.fully_trained) == STATISTICS
    delta.active = True
    equal(buffers(model), moved)
    assert torch.equal(model(x()), trained)
    delta.active = False
    # As without any delta: a forward in training is then the backbone's own.
    model.train()(x(3))
    mine = buffers(model.eval())
    delta.active = True
    assert torch.equal(model(x()), trained)
    delta.detach()
    equal(
        {name: value for name, value in buffers(model).items() if name in STATISTICS},
        {name: mine[name] for name in STATISTICS},
    )


def test_two_deltas_that_take_turns(model):
    own = buffers(model)
    one, two = attach(model, name="one"), attach(model, name="two")
    two.active = False
    step(model)
    one.active, two.active = False, True
    equal(buffers(model), own)
    step(model, seed=5)
    moved = buffers(model)
    assert set(one.fully_trained) == set(two.fully_trained) == STATISTICS
    with pytest.raises(dk.StateError, match=r"delta 'two' has running statistics of its own there already; detach\(\)"):
        one.active = True
    equal(buffers(model), moved)
    two.detach()
    one.active = True
    one.detach()
    equal(buffers(model), own)


def test_a_training_checkpoint_brings_the_statistics_of_the_delta(model):
    fresh, own = copy.deepcopy(model), buffers(model)
    attach(model)
    step(model)
    delta = attach(fresh)
    fresh.load_state_dict(model.state_dict())
    assert set(delta.fully_trained) == STATISTICS
    delta.detach()
    equal(buffers(fresh), own)


def test_copies_and_pickles_have_statistics_of_their_own(model):
    model.fc = nn.Linear(5, 2)  # torch does not pickle parametrized layers
    own = buffers(model)
    attach(model)
    step(model)
    moved = buffers(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        equal(buffers(other), moved)
        (delta,) = dk.deltas(other)
        delta.detach()
        equal(buffers(other), own)
    equal(buffers(model), moved)


def test_moved_to_another_dtype(model):
    own = buffers(model)
    delta = attach(model)
    model.double()
    assert delta.fully_trained == []
    model.train()
    model(x().double())
    assert set(delta.fully_trained) == STATISTICS
    delta.detach()
    for name, value in buffers(model).items():
        assert torch.equal(value, own[name].double() if value.is_floating_point() else own[name])


def test_what_cannot_be_shared_divided_or_summed(model):
    delta, other = attach(model, name="one"), attach(model, name="two")
    step(model)
    word = "delta 'one' has running statistics of its own, bn1.running_mean"
    with pytest.raises(dk.StateError, match=f"{word}, whose values are in the backbone itself, so it cannot be scaled"):
        delta.scale = 0.5
    with pytest.raises(dk.StateError, match=f"rows: {word}, which all examples share"), dk.rows(model, ["two"] * 3):
        pass
    with pytest.raises(dk.StateError, match=f"combine: {word}, and only delta modules can be summed"):
        dk.combine(model, {"one": 1.0, "two": 1.0})
    with pytest.raises(dk.StateError, match=f"swap: {word}, and only delta modules can be swapped"):
        delta.swap(other)
    output = model(x())
    delta.merge()
    torch.testing.assert_close(model(x()), output)
    delta.unmerge()
    assert torch.equal(model(x()), output)
    delta.detach()
    other.scale = 0.5


def test_statistics_stay_still_in_evaluation(model):
    """The way around: layers that are kept in evaluation move nothing."""
    delta = attach(model)
    model.train()
    for module in (model.bn1, model.bn2, model.book, model.fc):
        module.eval()
    model(x()).sum().backward()
    assert delta.fully_trained == []


def test_packed_offloaded_and_large_buffers_are_not_copied(monkeypatch):
    class Packed(nn.Module):
        in_features, out_features = 3, 3

        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.eye(3, dtype=torch.int32))

        def forward(self, x):
            return x @ self.qweight.to(x.dtype)

    model = nn.Sequential(nn.Linear(3, 3), Packed(), nn.BatchNorm1d(3))
    model.register_buffer("far", torch.zeros(3, device="meta"))
    model.register_buffer("large", torch.zeros(1000))
    monkeypatch.setattr("deltakit.core.buffer_ledger._LARGEST", 100)
    delta = randomize(dk.attach(model, dk.LoRA(r=1, at="0")))
    assert set(delta._record.buffer_ledger.own) == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    model(torch.randn(5, 3)).sum().backward()
    assert len(delta.fully_trained) == 3
    delta.detach()
    assert int(model[2].num_batches_tracked) == 0


def test_a_layer_that_was_removed_takes_its_statistics_along(model):
    delta = attach(model)
    step(model)
    model.bn1 = nn.Identity()
    model.book = nn.Identity()
    assert {name.split(".")[0] for name in delta.fully_trained} >= {"bn2", "fc"}


def test_caches_of_two_deltas_do_not_keep_them_apart():
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    one = dk.attach(model, dk.LoRA(r=1, at="0"), name="one")
    model.cache = torch.ones(5)
    one.detach()
    two = dk.attach(model, dk.LoRA(r=1, at="0"), name="two")
    model.cache = torch.ones(3)
    one.attach()
    assert torch.equal(model.cache, torch.ones(3))
    assert not one.fully_trained + two.fully_trained
    with dk.rows(model, ["one", "two"]):
        model(torch.randn(2, 7))
    one.detach()
    two.detach()
    assert torch.equal(model.cache, torch.zeros(2))


def test_the_statistics_go_to_the_delta_that_was_trained(tmp_path):
    base = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    model, x = copy.deepcopy(base), torch.randn(9, 6) * 3 + 1
    randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name="first")).save(tmp_path / "first")
    dk.deltas(model)[0].detach()
    first = dk.load(tmp_path / "first", model)
    second = dk.attach(model, dk.LoRA(r=2, at="2"), name="second")
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    wanted = model.eval()(x)
    assert not first.fully_trained
    assert "1.running_mean" in second.fully_trained
    second.save(tmp_path / "second")
    dk.load(tmp_path / "first", base)
    dk.load(tmp_path / "second", base)
    assert torch.equal(base.eval()(x), wanted)


class Filled(nn.Module):
    """Its buffer is None until the first forward in training."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("average", None)

    def forward(self, x):
        y = self.layer(x)
        if self.training:
            mean = y.detach().mean(0)
            self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        return y if self.average is None else y - self.average


def test_a_buffer_that_forwards_fill_is_empty_again():
    model, x = Filled(), torch.randn(3, 4)
    keys = list(model.state_dict())
    one = dk.attach(model, dk.LoRA(r=2, at="layer"), name="one")
    two = dk.attach(model, dk.BitFit(at="layer"), name="two")
    model.train()(x).sum().backward()
    one.detach()
    assert model.average is not None
    two.detach()
    assert model.average is None
    assert list(model.state_dict()) == keys
    model(x)
    two.attach()
    two.detach()
    assert model.average is not None
