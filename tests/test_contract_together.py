"""What every registered method promises beside other deltas: mixed batches, weighted sums, and the order of attachment."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer, beside, ids, method_of, randomize, same, snapshot

ALL = sorted(dk.METHODS)
every_method = pytest.mark.parametrize("name", ALL)


@pytest.fixture
def model(name):
    torch.manual_seed(5)
    return beside(Transformer().double().eval(), method_of(name))


def named(model, name, *labels):
    """Deltas of one method with different values."""
    # Without parameters, the options are what differs.
    weights = [{"weights": (1, 2 + number)} if name == "average" else {} for number in range(len(labels))]
    return [
        randomize(dk.attach(model, method_of(name, **own), name=label))
        for label, own in zip(labels, weights, strict=True)
    ]


def modules_of(delta):
    return [site.module for site in delta._attachment.sites]


def alone(model, deltas, own):
    """The backbone with one of the deltas active, or with none."""
    for delta in deltas:
        delta.active = delta.name == own
    return model


@every_method
def test_examples_of_a_mixed_batch_are_as_alone(model, name):
    deltas = named(model, name, "one", "two")
    before, names = snapshot(model), ["one", None, "two", "one"]
    if not all(module.mixable and module.weight_read is None for delta in deltas for module in modules_of(delta)):
        with pytest.raises(dk.StateError, match="rows"), dk.rows(model, names):
            model(ids(4))
        same(before, snapshot(model))
        return
    try:
        together = dk.rows(model, names)(ids(4))
    except dk.StateError as error:
        # This backbone has no mask, which an example without a prompt needs beside one with a prompt.
        assert "different lengths" in str(error)
        names[1] = "two"
        together = dk.rows(model, names)(ids(4))
    singles = [alone(model, deltas, own)(ids(4)[row : row + 1]) for row, own in enumerate(names)]
    torch.testing.assert_close(together, torch.cat(singles), rtol=1e-9, atol=1e-9)
    # The values of the two show, and so does which example has which.
    swapped = alone(model, deltas, "two")(ids(4)[:1])
    assert not torch.allclose(swapped, singles[0])
    assert not torch.allclose(alone(model, deltas, None)(ids(4)[:1]), singles[0])


@every_method
def test_a_weighted_sum_is_exact_or_an_error(model, name):
    deltas = named(model, name, "one", "two")
    weights = {"one": 0.7, "two": -0.3}
    try:
        sum_of_both = dk.combine(model, weights)
    except dk.TargetError as error:
        assert "not linear" in str(error) or "share one theta" in str(error)
        assert "run the deltas one by one" in str(error)
        return
    assert sum_of_both.error < 1e-6
    for delta in deltas:
        delta.detach()
    changes = [changed_weights(model, delta) for delta in (*deltas, sum_of_both.delta)]
    assert changes[2], "nothing that it changes is a weight, so this test needs another way to compare"
    for weight, change in changes[2].items():
        wanted = 0.7 * changes[0][weight] - 0.3 * changes[1][weight]
        torch.testing.assert_close(change, wanted, rtol=1e-6, atol=1e-6)


def changed_weights(model, delta):
    """What a delta adds to each weight into which it can be merged."""
    found = {}
    delta.attach()
    for site in delta._attachment.sites:
        # A bias cannot be merged into a layer that has none.
        with contextlib.suppress(dk.TargetError):
            for name, update in site.module.weight_updates(site.target).items():
                found[f"{site.owner}.{name}"] = update.clone()
    delta.detach()
    return found


@every_method
def test_several_deltas_at_one_place_act_in_the_order_of_attachment(model, name):
    # One delta takes a method once at a target.
    other = dk.LowRankAdapter if name == "adapter" else dk.Adapter
    first, second = method_of(name), other(size=3, at=places(model, name))
    one, two = dk.attach(model, first, name="one"), dk.attach(model, second, name="two")
    randomize(one), randomize(two)
    output = model(ids())
    # Several methods in one delta do the same, in their order.
    twin = Transformer().double().eval()
    twin.load_state_dict(dk.base_state_dict(model))
    beside(twin, first)
    both = dk.attach(twin, first, second, name="both")
    for own, other in zip(modules_of(both), (*modules_of(one), *modules_of(two)), strict=True):
        own.load_state_dict(other.state_dict())
    assert torch.equal(twin(ids()), output)
    # The order is that of the first attachment.
    one.detach().attach()
    assert torch.equal(model(ids()), output)
    two.detach()
    # Other people's hooks run behind all deltas: here they do what the second delta does.
    hooks = [model.get_submodule(path).register_forward_hook(hooked(module)) for path, (module,) in two.modules.items()]
    torch.testing.assert_close(model(ids()), output, rtol=1e-12, atol=1e-12)
    for hook in hooks:
        hook.remove()
    two.attach()
    one.active = False
    assert not torch.allclose(model(ids()), output)
    one.detach(), two.detach()


def places(model, name):
    """The modules with hidden states as their output that a method is at, or reads."""
    block = model.layers[0]
    hidden = (nn.Linear, nn.Embedding, nn.LayerNorm, type(block), type(block.self_attn), type(block.mlp))
    sites = dk.attach(copy.deepcopy(model), method_of(name))._attachment.sites
    return list(dict.fromkeys(site.owner for site in sites if isinstance(site.target, hidden)))


def hooked(module):
    """A forward hook that does what an adapter does, which does not look at the input."""

    def hook(target, args, output):
        y = output[0] if isinstance(output, tuple) else output
        return (module(y, y), *output[1:]) if isinstance(output, tuple) else module(y, y)

    return hook
