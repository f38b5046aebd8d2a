"""Two deltas of one kind exchanging their values."""

import pytest
import torch

import deltakit as dk
from support.models import Transformer, ids, randomize

METHODS = (dk.LoRA(r=3), dk.Adapter(size=2), dk.BitFit(), dk.Prefix(tokens=2))


def two(*methods, second=None):
    model = Transformer().eval()
    one = randomize(dk.attach(model, *methods, name="one"))
    with one.detached():
        other = randomize(dk.attach(model, *(second or methods), name="other"))
        outputs = model(ids())
        other.detach()
    return model, one, other, outputs


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_each_has_what_the_other_had(method):
    model, one, other, outputs = two(method)
    before = model(ids())
    states = [dict(delta.state_dict()) for delta in (one, other)]
    assert one.swap(other) is one
    torch.testing.assert_close(model(ids()), outputs, rtol=0, atol=0)
    for delta, state in zip((other, one), states, strict=True):
        torch.testing.assert_close(dict(delta.state_dict()), state, rtol=0, atol=0)
    other.swap(one)
    torch.testing.assert_close(model(ids()), before, rtol=0, atol=0)
    assert (one.name, other.name) == ("one", "other")


def test_a_graph_made_before_does_not_go_on_with_other_values():
    model, one, other, _ = two(dk.LoRA(r=3))
    loss = model(ids()).square().sum()
    one.swap(other)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (dk.LoRA(r=3), dk.LoRA(r=3, alpha=5), r"must have the same methods with the same options; found .*'alpha': 16"),
        (
            dk.LoRA(r=3),
            dk.LoRA(r=3, at="@attn.k"),
            r"must have the same targets; only one of them has layers\.0\.self_attn\.q_proj",
        ),
        (
            dk.LoRA(r=3, at="@attn.q"),
            dk.LoRA(r=3),
            r"must have the same targets; only one of them has layers\.0\.self_attn\.v_proj",
        ),
    ],
)
def test_deltas_that_differ_are_refused(first, second, message):
    model, one, other, _ = two(first, second=[second])
    before = model(ids())
    with pytest.raises(dk.StateError, match=message):
        one.swap(other)
    assert torch.equal(model(ids()), before)


def test_tensors_that_differ_are_refused():
    _, one, other, _ = two(dk.LoRA(r=3))
    for modules in other.modules.values():
        modules[0].double()
    with pytest.raises(
        dk.StateError, match=r"q_proj\.A is \(3, 20\) in torch.float32 on cpu and \(3, 20\) in torch.float64"
    ):
        one.swap(other)


def test_not_now():
    model, one, other, _ = two(dk.LoRA(r=3))
    one.merge()
    with pytest.raises(dk.StateError, match=r"swap: delta 'one' is merged into the weights: unmerge\(\) it"):
        other.swap(one)
    one.unmerge()
    with (
        pytest.raises(dk.StateError, match=r"swap: delta 'one' is in a rows\(\) block: leave the block"),
        dk.rows(model, ["one"]),
    ):
        one.swap(other)
    one.freeze(train="norm")
    with pytest.raises(dk.StateError, match=r"swap: delta 'one' fully trains norm\.weight"):
        one.swap(other)
