"""What is known of the delta modules of a target agrees with what is there, whoever changed it."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.core import DeltaModule, add_held, held_in, own_modules, records_at, remove_held


class Part(DeltaModule):
    """A delta module of no delta."""


class Other(DeltaModule):
    pass


def agrees(module):
    children = module._modules
    all_deltas = bool(children) and all(isinstance(child, DeltaModule) for child in children.values())
    known = held_in(children)
    assert (known is not None) == all_deltas
    if known is not None:
        assert known.records == Counter(child.record for child in children.values())
        assert known.kinds == Counter(map(type, children.values()))
        assert held_in(children) is known


@pytest.fixture
def target():
    module = nn.Linear(2, 3)
    for key in "abcd":
        add_held(module, key, Other() if key == "b" else Part())
        agrees(module)
    return module


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
def test_each_can_be_removed(target, order):
    for key in order:
        remove_held(target, key)
        agrees(target)
    assert held_in(target._modules) is None


def test_what_the_user_adds_is_seen(target):
    agrees(target)
    del target.b
    target.mine = nn.Linear(2, 2)
    agrees(target)
    assert ("mine", target.mine) in list(own_modules(target))
    add_held(target, "e", Part())
    agrees(target)
    del target.mine
    agrees(target)


def test_what_the_user_removes_is_seen(target):
    del target.a
    agrees(target)
    del target.d
    agrees(target)
    remove_held(target, "b")
    agrees(target)


def test_what_the_user_replaces_with_a_delta_module_of_another_class_does_not_break_it(target):
    target.e = Other()
    agrees(target)
    remove_held(target, "e")
    agrees(target)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_know_their_own(copied):
    model = nn.Sequential(nn.Linear(2, 3))
    delta = dk.attach(model, dk.LoRA(r=1, at="0"))
    dk.attach(model, dk.LoRA(r=1, at="0"), name="other")
    twin = copied(model)
    assert [record.name for record in records_at(twin[0])] == ["delta", "other"]
    assert not {*records_at(twin[0])} & {*records_at(model[0])}
    dk.deltas(twin)[0].detach()
    agrees(twin[0])
    assert len(records_at(model[0])) == 2
    delta.detach()
    assert [record.name for record in records_at(model[0])] == ["other"]
    assert all(vars(site.module)["_deltakit_held"] is None for site in delta._attachment.sites)


def test_an_interrupted_change_is_found(target):
    known = held_in(target._modules)
    # As after Ctrl-C between the lines of `add_held`.
    target.add_module("e", Part())
    known.records[None] += 1
    agrees(target)
    assert held_in(target._modules).count == 5
    with torch.no_grad():
        del target._modules["e"]
    agrees(target)
