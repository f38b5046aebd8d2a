"""Hooks on targets that several deltas share: they stay while deltas come and go, and are registered again where they must be."""

import pytest
import torch
from torch import nn

import deltakit as dk


def _attached(model, name):
    delta = dk.attach(model, dk.LoRA(r=2, at="0"), name=name)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
    return delta


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(7, 5))


def _updated(model, x, *deltas):
    """The output of the bare layer with the updates of some deltas, in float64."""
    w = model[0].weight.double()
    for delta in deltas:
        a, b = (p.double() for p in delta.parameters())
        w = w + 8 * b @ a
    return x.double() @ w.T + model[0].bias.double()


def _close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_second_delta_registers_no_hook(model, monkeypatch):
    """The hook that is there gets another list of deltas, in the order in which they were first attached."""
    first, x = _attached(model, "first"), torch.randn(3, 7)
    (hook,) = model[0]._forward_hooks.values()
    monkeypatch.setattr(model[0], "register_forward_hook", lambda *_, **__: pytest.fail("a hook was registered again"))
    second, third = _attached(model, "second"), _attached(model, "third")
    assert list(model[0]._forward_hooks.values()) == [hook]
    assert hook.delta_keys == ("first_lora", "second_lora", "third_lora")
    _close(model(x), _updated(model, x, first, second, third))
    second.detach()
    _close(model(x), _updated(model, x, first, third))
    second.attach()
    assert hook.delta_keys == ("first_lora", "second_lora", "third_lora")


def test_the_last_delta_takes_the_hooks_with_it(model):
    first, second = _attached(model, "first"), _attached(model, "second")
    first.detach()
    second.detach()
    assert not model[0]._forward_hooks
    assert not model[0]._forward_hooks_with_kwargs


def test_hooks_of_others_are_behind_those_of_a_new_delta(model):
    """transformers captures hidden states by hooks that it puts first: they must see what a delta adds later."""
    first, seen = _attached(model, "first"), []
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output.clone()), prepend=True)
    second, x = _attached(model, "second"), torch.randn(3, 7)
    model(x)
    _close(seen[0], _updated(model, x, first, second))


def test_a_hook_that_was_registered_in_part_is_registered_again(model):
    """Ctrl-C within torch's registration leaves a hook that is called without keyword arguments, and then does nothing."""
    first, x = _attached(model, "first"), torch.randn(3, 7)
    model[0]._forward_hooks_with_kwargs.clear()
    second = _attached(model, "second")
    _close(model(x), _updated(model, x, first, second))


def test_two_hooks_after_an_interruption_become_one(model):
    first, x = _attached(model, "first"), torch.randn(3, 7)
    (hook,) = model[0]._forward_hooks.values()
    model[0].register_forward_hook(type(hook)(hook.delta_keys), with_kwargs=True)
    second = _attached(model, "second")
    assert len(model[0]._forward_hooks) == 1
    _close(model(x), _updated(model, x, first, second))


def test_a_call_before_a_delta_was_attached_is_not_taken_for_its_own():
    """The hook has run for another delta. The check of the new one's first forward must not believe that it ran for it."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(7, 5))
            self.calls = True

        def forward(self, x):
            return self.inner(x) if self.calls else nn.functional.linear(x, self.inner[0].weight)

    model = nn.Sequential(Reads())
    dk.attach(model, dk.LoRA(r=2, at="0.inner.0"), name="first")
    model(torch.randn(3, 7))
    model[0].calls = False
    dk.attach(model, dk.LoRA(r=2, at="0.inner.0"), name="second")
    with pytest.warns(dk.DeltaWarning, match="were not called in the first forward"):
        model(torch.randn(3, 7))


def test_a_delta_module_that_the_user_removed_beside_a_weight_patch(model):
    """As many delta modules are there as the hook has keys, and they are others."""
    patch = dk.attach(model, dk.LoRA(r=2, at="0.weight"), name="patch")
    _attached(model, "first")
    model(torch.randn(3, 7))
    del model[0]._modules["first_lora"]
    second, x = _attached(model, "second"), torch.randn(3, 7)
    _close(model(x), _updated(model, x, second))
    assert patch.attached
