"""A delta compared with the bare backbone whose weights were changed by hand to what the delta stands for."""

import copy

import pytest
import torch

import deltakit as dk
from support.models import randomize, same, snapshot


def changed_by_hand(model, delta):
    """A copy of the bare backbone with the delta's updates added to its weights by hand."""
    other = copy.deepcopy(model)
    dk.deltas(other)[0].detach()
    for path, modules in delta.modules.items():
        for module in modules:
            owner = other.get_submodule(path.removesuffix(module.part).removesuffix("."))
            for name, update in module.weight_updates(owner).items():
                with torch.no_grad():
                    owner._parameters[name].add_(update)
    return other


def check_against_changed_weights(model, call, method, targets):
    """Identity, the same output and gradients as changed weights, key names kept, exact detach."""
    before, bare = snapshot(model), call(model)
    keys = set(model.state_dict())
    delta = dk.attach(model, method)
    assert sorted(delta.modules) == sorted(targets)
    assert torch.equal(call(model), bare)
    assert keys <= set(model.state_dict())
    randomize(delta)
    torch.testing.assert_close(call(model), call(changed_by_hand(model, delta)))
    assert not torch.allclose(call(model), bare)
    call(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in delta.parameters())
    with pytest.raises((TypeError, ValueError)):
        model("no tensor", "at all", None, None)
    delta.detach()
    model.zero_grad()
    same(before, snapshot(model))
    assert torch.equal(call(model), bare)
