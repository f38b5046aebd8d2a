"""`use`: one call makes exactly these deltas active."""

import pytest
import torch

import deltakit as dk
from support.models import Transformer, ids, randomize

NAMES = ("spelling", "topic", "facts")


@pytest.fixture
def model():
    model = Transformer().eval()
    for name in NAMES:
        randomize(dk.attach(model, dk.LoRA(r=2), name=name), 0.3)
    return model


def active(model):
    return [delta.name for delta in dk.deltas(model) if delta.active]


def test_exactly_these_are_active(model):
    bare = [delta.active for delta in dk.deltas(model)]
    assert bare == [True] * 3
    assert repr(dk.use(model, "topic")) == "in use: topic"
    assert active(model) == ["topic"]
    dk.use(model, "facts", "spelling")
    assert active(model) == ["spelling", "facts"]
    assert repr(dk.use(model, None)) == "in use: no delta"
    assert active(model) == []
    fresh = Transformer().eval()
    fresh.load_state_dict(dk.base_state_dict(model))
    assert torch.equal(model(ids()), fresh(ids()))


def test_a_block_brings_the_earlier_choice_back(model):
    dk.use(model, "topic")
    with dk.use(model, "facts"):
        assert active(model) == ["facts"]
        with dk.use(model, None):
            assert active(model) == []
        assert active(model) == ["facts"]
    assert active(model) == ["topic"]
    with pytest.raises(ZeroDivisionError), dk.use(model, "facts"):
        raise ZeroDivisionError
    assert active(model) == ["topic"]


def test_what_is_kept_can_be_entered_again(model):
    topic = dk.use(model, "topic")
    dk.use(model, "facts")
    for _ in range(2):
        with topic:
            assert active(model) == ["topic"]
        assert active(model) == ["facts"]


def test_what_is_detached_in_a_block_is_left_alone(model):
    with dk.use(model, "facts"):
        dk.deltas(model)[0].detach()
    assert active(model) == ["topic", "facts"]


def test_names_that_are_not_there(model):
    dk.use(model, "topic")
    with pytest.raises(
        dk.OptionError,
        match=r"use: no delta named 'fact' is attached; the attached deltas are 'spelling', 'topic', 'facts'$",
    ):
        dk.use(model, "facts", "fact")
    with pytest.raises(
        dk.OptionError, match="use: no name was given; pass the names of attached deltas, or None for the bare backbone"
    ):
        dk.use(model)
    assert active(model) == ["topic"]


def test_all_or_none(model):
    """A merged delta cannot be switched off, so none is."""
    spelling, topic, facts = dk.deltas(model)
    dk.use(model, "spelling")
    spelling.merge()
    with pytest.raises(dk.StateError, match="delta 'spelling' is merged into the weights"):
        dk.use(model, "facts")
    assert active(model) == ["spelling"]
    assert (topic.active, facts.active) == (False, False)
    dk.use(model, "spelling")


def test_two_that_train_the_same_part():
    model = Transformer().eval()
    one = randomize(dk.attach(model, dk.LoRA(r=2), train="@head", name="one"))
    one.active = False
    two = randomize(dk.attach(model, dk.LoRA(r=2), name="two"))
    for _ in range(2):
        dk.use(model, "two")
        assert (one.active, two.active) == (False, True)
        dk.use(model, "one")
        assert (one.active, two.active) == (True, False)
