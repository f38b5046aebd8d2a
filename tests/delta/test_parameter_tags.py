"""Tags of parameters: groups for optimisers, and parts of a delta that are never trained."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from deltakit.core import FROZEN, DeltaModule
from deltakit.ops import LowRank, kaiming_uniform, like
from support.kind_methods import registered
from support.models import Transformer, ids, randomize, same, snapshot


class HalfFrozenDelta(LowRank):
    """A product whose A stays as it starts (LoRA-FA), with a child whose weight is frozen too."""

    tags: ClassVar = {"A": FROZEN, "child": FROZEN, "child.bias": "shift", "B": "up"}

    def __init__(self, target):
        super().__init__(target)
        new = like(target)
        self.A = nn.Parameter(torch.empty(3, self.d_in, **new))
        self.B = nn.Parameter(torch.zeros(self.d_out, 3, **new))
        self.child = nn.Linear(3, 3, **new)
        self.plain = nn.Parameter(torch.ones((), **new))
        kaiming_uniform(self.A)

    def factors(self):
        return self.A, self.child(self.B) * self.plain - self.child(0 * self.B) * self.plain + 0 * self.child.bias


@dataclass(frozen=True, kw_only=True)
class HalfFrozen(dk.Method):
    name: ClassVar[str] = "test_tags"
    kind: ClassVar[type[DeltaModule]] = HalfFrozenDelta


@pytest.fixture(autouse=True)
def methods():
    with registered(HalfFrozen):
        yield


def every(groups):
    return [id(parameter) for group in groups for parameter in group["params"]]


class TestGroups:
    def test_lora_plus(self):
        delta = dk.attach(Transformer(), dk.LoRA(r=3))
        groups = delta.parameter_groups(up={"lr": 16e-3})
        assert {group["tag"]: group.get("lr") for group in groups} == {"": None, "up": 16e-3}
        by_tag = {group["tag"]: group["params"] for group in groups}
        assert {id(p) for p in by_tag["up"]} == {id(p) for name, p in delta.named_parameters() if name.endswith(".B")}
        assert sorted(every(groups)) == sorted(id(p) for p in delta.parameters())
        assert len(set(every(groups))) == len(every(groups))
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        assert {group["tag"]: group["lr"] for group in optimizer.param_groups} == {"": 1e-3, "up": 16e-3}

    def test_both_tags_and_none(self):
        delta = dk.attach(Transformer(), dk.LoRA(r=3), dk.BitFit(at="classifier"))
        groups = delta.parameter_groups(down={"lr": 1}, up={"lr": 2, "weight_decay": 0})
        assert [group["tag"] for group in groups] == ["down", "up", ""]
        assert [len(group["params"]) for group in groups] == [4, 4, 1]
        (alone,) = delta.parameter_groups()
        assert (alone["tag"], len(alone["params"])) == ("", 9)

    def test_what_is_fully_trained(self):
        model = Transformer()
        delta = dk.attach(model, dk.LoRA(r=3), train="classifier")
        groups = delta.parameter_groups(fully_trained={"weight_decay": 0.1})
        by_tag = {group["tag"]: group["params"] for group in groups}
        assert {id(p) for p in by_tag["fully_trained"]} == {id(p) for p in model.classifier.parameters()}
        assert sorted(every(groups)) == sorted(id(p) for p in delta.parameters())

    def test_an_unknown_tag(self):
        delta = dk.attach(Transformer(), dk.LoRA(r=3))
        with pytest.raises(
            dk.OptionError,
            match=r"parameter_groups\(upp=\.\.\.\): no parameter of delta 'delta' has this tag; its tags are 'down', 'up'",
        ):
            delta.parameter_groups(upp={"lr": 1})
        with pytest.raises(dk.OptionError, match="fully_trained"):
            delta.parameter_groups(fully_trained={"lr": 1})
        with pytest.raises(dk.OptionError, match="its tags are none"):
            dk.attach(Transformer(), dk.BitFit()).parameter_groups(up={"lr": 1})

    def test_steps_at_their_own_rates(self):
        model = Transformer()
        delta = randomize(dk.attach(model, dk.LoRA(r=3)))
        before = [p.detach().clone() for p in delta.parameters()]
        optimizer = torch.optim.SGD(delta.parameter_groups(down={"lr": 0.0}), lr=0.5)
        model(ids()).square().sum().backward()
        optimizer.step()
        for (name, p), was in zip(delta.named_parameters(), before, strict=True):
            assert torch.equal(p, was) is name.endswith(".A")

    def test_of_a_detached_delta(self):
        delta = dk.attach(Transformer(), dk.LoRA(r=3))
        attached = every(delta.parameter_groups(up={}))
        assert every(delta.detach().parameter_groups(up={})) == attached


class TestFrozen:
    def held(self):
        model = Transformer().eval()
        delta = dk.attach(model, HalfFrozen(at="*.q_proj"))
        return model, delta, [module for own in delta.modules.values() for module in own]

    def frozen(self, modules):
        return [p for m in modules for p in (m.A, m.child.weight)]

    def test_it_never_requires_gradients(self):
        model, delta, modules = self.held()
        for change in (
            lambda: None,
            lambda: setattr(delta, "trainable", True),
            lambda: setattr(delta, "trainable", False),
            lambda: setattr(delta, "trainable", True),
            lambda: delta.detach().attach(),
            lambda: delta.freeze(train="classifier"),
        ):
            change()
            assert not any(p.requires_grad for p in self.frozen(modules))
        randomize(delta)
        model(ids()).square().sum().backward()
        assert all(p.grad is None for p in self.frozen(modules))
        assert all(m.B.grad.any() for m in modules)

    def test_a_part_of_a_child_has_its_own_tag(self):
        _, delta, modules = self.held()
        assert all(m.child.bias.requires_grad for m in modules)
        groups = {group["tag"]: group["params"] for group in delta.parameter_groups(shift={}, up={})}
        assert {tag: len(found) for tag, found in groups.items()} == {"shift": 2, "up": 2, "": 2}
        with pytest.raises(dk.OptionError, match="its tags are"):
            delta.parameter_groups(frozen={})

    def test_it_is_no_parameter_of_the_delta(self):
        model, delta, modules = self.held()
        mine = {id(p) for p in delta.parameters()}
        assert not mine & {id(p) for p in self.frozen(modules)}
        assert mine == {id(p) for p in model.parameters() if p.requires_grad}
        size = 2 * (20 * 3 + 3 + 1)
        assert delta.num_parameters == size
        assert dk.plan(Transformer(), HalfFrozen(at="*.q_proj")).num_parameters == size
        assert f"{size:,}" in repr(delta)

    def test_it_is_saved_and_loaded(self, tmp_path):
        model, delta, _ = self.held()
        fresh = copy.deepcopy(model)
        dk.deltas(fresh)[0].detach()
        randomize(delta)
        delta.save(tmp_path)
        names = load_file(tmp_path / "delta_model.safetensors")
        assert sum(name.endswith((".A", "child.weight")) for name in names) == 4
        loaded = dk.load(tmp_path, fresh)
        assert torch.equal(fresh(ids()), model(ids()))
        modules = [module for own in loaded.modules.values() for module in own]
        assert not any(p.requires_grad for p in self.frozen(modules))

    def test_copies_and_swaps_keep_it(self):
        model, delta, _ = self.held()
        randomize(delta)
        twin = copy.deepcopy(model)
        (own,) = dk.deltas(twin)
        assert not any(p.requires_grad for p in self.frozen([m for held in own.modules.values() for m in held]))
        output = model(ids())
        delta.detach()
        other = dk.attach(model, HalfFrozen(at="*.q_proj")).swap(delta)
        assert torch.equal(model(ids()), output)
        modules = [m for held in other.modules.values() for m in held]
        assert not any(p.requires_grad for p in self.frozen(modules))

    def test_detach_is_exact(self):
        model = Transformer().eval()
        before, bare = snapshot(model), model(ids())
        delta = dk.attach(model, HalfFrozen(at="*.q_proj"))
        model(ids())
        delta.detach()
        same(before, snapshot(model))
        assert torch.equal(model(ids()), bare)
