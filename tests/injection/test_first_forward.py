"""The check in the first forward that every target was called."""

import threading

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.injection import first_forward, tables
from support.models import Transformer, ids, randomize, same, snapshot


def hidden_read(model, x):
    return nn.functional.linear(x, model.read.weight)


class Reads(nn.Module):
    """Reads the weight of one of its layers where its own code does not show it, and never calls that layer."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(7, 5), nn.Linear(7, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(7, 5)) for _ in range(2))

    def forward(self, x, expert=None):
        y = hidden_read(self, x) + self.called(x)
        return y if expert is None else y + self.experts[expert](x)


def test_a_target_that_is_never_called_is_an_error_until_it_is_detached():
    model, x = Reads(), torch.ones(1, 7)
    bare = model(x)
    delta = dk.attach(model, dk.LoRA(r=2, at=["read", "called"]))
    for _ in range(2):
        with pytest.raises(dk.TargetError, match="read: delta 'delta' did nothing here: .* at='read.weight'"):
            model(x)
    delta.detach()
    assert torch.equal(model(x), bare)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    dk.attach(model, dk.Adapter(size=2, at="read"))
    with pytest.raises(dk.TargetError, match="because Adapter has no weight patch"):
        model(x)
    dk.deltas(model)[0].detach()
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at=["read.weight", "called"])))
    update = delta.modules["read.weight"][0].update()
    assert not torch.equal(model(x), bare)
    delta.detach()
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="read.weight")))
    torch.testing.assert_close(model(x), bare + x @ delta.modules["read.weight"][0].update().T)
    assert update.shape == (5, 7)


def test_deltas_beside_one_that_cleans_up_are_called():
    """The hooks of all deltas on a module are one, also where a prefix needs another kind of hook."""
    model = Transformer()
    prefix = dk.attach(model, dk.Prefix(tokens=2))
    delta = dk.attach(model, dk.Adapter(size=2, at=list(prefix.modules)))
    model(ids())
    assert delta.modules.keys() == prefix.modules.keys()


def test_a_forward_that_raised_proves_nothing():
    """The user must get the error of the forward itself, and the check must still be made in the next one."""
    model, x = Reads(), torch.ones(1, 7)
    dk.attach(model, dk.LoRA(r=2, at=["read", "called"]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(1, 3))
    with pytest.raises(dk.TargetError, match="read: delta 'delta' did nothing here"):
        model(x)


def test_a_target_whose_surroundings_did_not_run_is_a_warning():
    model = Reads()
    delta = dk.attach(model, dk.LoRA(r=2, at=["called", "experts.{0,1}.0"]))
    with pytest.warns(
        dk.DeltaWarning, match="1 of its targets were not called in the first forward, such as experts.1.0"
    ):
        model(torch.ones(1, 7), expert=0)
    model(torch.ones(1, 7), expert=0)
    delta.detach().attach()
    model(torch.ones(1, 7))
    assert not model._forward_hooks


def test_surroundings_that_ran_in_a_forward_that_raised_prove_nothing():
    model, x = Reads(), torch.ones(1, 7)
    dk.attach(model, dk.LoRA(r=2, at=["called", "experts.0.0"]))
    model.experts[0][0].forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(x, expert=0)
    with pytest.warns(dk.DeltaWarning, match=r"not called in the first forward, such as experts\.0\.0"):
        model(x)


def test_the_error_counts_the_targets_that_were_never_called():
    model = Reads()
    model.read_too = nn.Linear(7, 5)
    dk.attach(model, dk.LoRA(r=2, at=["read", "read_too", "called"]))
    with pytest.raises(
        dk.TargetError, match=r"read: delta 'delta' did nothing here \(2 such targets\): in the first forward"
    ):
        model(torch.ones(1, 7))


def test_a_first_forward_that_fails_leaves_no_hooks():
    model = nn.Sequential(nn.Sequential(nn.Linear(7, 5)))
    dk.attach(model, dk.LoRA(r=2, at="0.0"))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(1, 3))
    same(before, snapshot(model))


def test_what_compiled_code_notes_is_kept_until_the_check_has_read_it(monkeypatch):
    """While one thread's forward is checked, another thread begins one."""
    model, x = Reads(), torch.ones(1, 7)
    delta = dk.attach(model, dk.LoRA(r=2, at=["read", "called"]))
    check = next(hook.__self__ for hook in model._forward_pre_hooks.values() if hasattr(hook, "__self__"))
    assert isinstance(check, first_forward.FirstForward)

    def ids_of_modules(backbone):
        other = threading.Thread(target=check.begin, args=(model, ()))
        other.start()
        other.join()
        return tables.ids_of_modules(backbone)

    def compiled_code(layer, args):
        delta._record.compiled = True

    monkeypatch.setattr(first_forward, "ids_of_modules", ids_of_modules)
    model.called.register_forward_pre_hook(compiled_code)
    model(x)
    assert delta._record.checked


def test_what_compiled_code_noted_before_is_forgotten():
    model, x = Reads(), torch.ones(1, 7)
    delta = dk.attach(model, dk.LoRA(r=2, at=["read", "called"]))
    # A forward that raised leaves the check of this thread open.
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(1, 3))
    delta._record.compiled = True
    with pytest.raises(dk.TargetError, match="read: delta 'delta' did nothing here"):
        model(x)
