"""Ctrl-C in what changes a delta: attach, detach, merge, freeze, swap, loading and the like."""

import pytest
import torch

import deltakit as dk
from support.interruptions import everything, interrupted, lines_of, unchanged
from support.models import Transformer, attached, ids, randomize

METHODS = (dk.LoRA(r=2), dk.BitFit(at="norm"), dk.LoRA(r=2, at="layers.0.mlp.up_proj.weight"))


def start():
    """A backbone of which a part is frozen, and everything about it."""
    torch.manual_seed(5)
    model = Transformer().eval()
    model.layers[0].mlp.requires_grad_(False)
    return model, everything(model)


def deltas_on(model, *, train="classifier"):
    """Two attached deltas whose values show. The second one is returned."""
    attached(model, dk.LoRA(r=3), name="other", freeze=False)
    return attached(model, *METHODS, name="mine", train=train)


def inside(delta):
    with delta.detached():
        pass


def load_others(delta):
    delta.load_state_dict({name: value + 1 for name, value in delta.state_dict().items()})


# What comes before the call that is interrupted, and the call.
OPERATIONS = {
    "attach": (lambda delta: delta.detach(), lambda delta: delta.attach()),
    "attach a new one": (lambda delta: None, lambda delta: dk.attach(delta.backbone, dk.Prefix(tokens=2), train="norm")),
    "detach": (lambda delta: None, lambda delta: delta.detach()),
    "merge": (lambda delta: None, lambda delta: delta.merge()),
    "unmerge": (lambda delta: delta.merge(), lambda delta: delta.unmerge()),
    "detach a merged one": (lambda delta: delta.merge(), lambda delta: delta.detach()),
    "freeze": (lambda delta: None, lambda delta: delta.freeze(train="embed")),
    "detached": (lambda delta: None, inside),
    "detached while merged": (lambda delta: delta.merge(), inside),
    "load_state_dict": (lambda delta: None, load_others),
    "load_state_dict while detached": (lambda delta: delta.detach(), load_others),
    "active": (lambda delta: None, lambda delta: setattr(delta, "active", False)),
    "trainable": (lambda delta: None, lambda delta: setattr(delta, "trainable", False)),
}  # fmt: skip


@torch.no_grad()
def check(operation, line, then=None):
    prepare, call = OPERATIONS[operation]
    model, before = start()
    bare = model(ids())
    delta = deltas_on(model)
    prepare(delta)
    values = delta.state_dict()
    values = {name: value.clone() for name, value in values.items()}
    interrupted(lambda: call(delta), line, then)
    where = f"{operation}, line {line}, then {then}"
    if then is None:
        # Every delta is there completely or not at all.
        sites = [site for other in (delta, *dk.deltas(model)) for site in other._attachment.sites]
        there = {
            record: {site.key is not None for site in sites if site.module.record is record}
            for record in {s.module.record for s in sites}
        }
        assert all(len(found) == 1 for found in there.values()), where
    # In this order, because a user may have no other handle than these.
    for other in dk.deltas(model):
        other.detach()
    delta.detach()
    unchanged(before, everything(model))
    assert torch.equal(model(ids()), bare), where
    if "load" not in operation:
        found = delta.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in values.items()), where
    elif then is None:
        moved = {bool((delta.state_dict()[name] - value).abs().max() > 0.5) for name, value in values.items()}
        assert len(moved) == 1, where


def all_lines(operation, wanted):
    prepare, call = OPERATIONS[operation]
    model, _ = start()
    delta = deltas_on(model)
    prepare(delta)
    return lines_of(lambda: call(delta), wanted)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_after_one_interruption_detach_is_exact(operation):
    for line in all_lines(operation, 12):
        check(operation, line)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_after_two_interruptions_detach_is_exact(operation):
    for number, line in enumerate(all_lines(operation, 5)):
        check(operation, line, 1 + 7 * number % 60)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_after_any_interruption_detach_is_exact(operation):
    for line in all_lines(operation, 400):
        check(operation, line)
        check(operation, line, 1 + line % 97)


@pytest.mark.parametrize("wanted", [12])
@torch.no_grad()
def test_swapping_is_all_or_nothing(wanted):
    model, _ = start()
    one = deltas_on(model, train=())
    other = randomize(dk.attach(model, *METHODS, name="twin"))
    before = [{name: value.clone() for name, value in delta.state_dict().items()} for delta in (one, other)]
    lines = lines_of(lambda: one.swap(other), wanted)
    one.swap(other)
    for line in lines:
        interrupted(lambda: one.swap(other), line)
        found = one.state_dict(), other.state_dict()
        assert any(
            all(
                torch.equal(value, now[name])
                for now, was in zip(found, wanted, strict=True)
                for name, value in was.items()
            )
            for wanted in (before, before[::-1])
        ), line
