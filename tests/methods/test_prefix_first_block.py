"""Prefixes that leave T5 its relative positions in the first block only. OpenDelta's own outputs: `test_reading_opendelta.py`."""

import copy
import pickle

import pytest
import torch
import transformers as tf

import deltakit as dk
from support.backbone_inputs import hidden, inputs
from support.models import randomize
from support.tiny_transformers import build


def attached(model, **options):
    delta = dk.attach(model, dk.Prefix(tokens=3, relative_positions="first_block", **options))
    randomize(delta, 1.0)
    return delta


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_it_is_the_usual_prefix_on_a_model_without_relative_positions(kind):
    """Where the first block's table is zero, only the usual sums are left."""
    model = build(kind)
    batch = inputs(kind, model)
    before = hidden(model(**batch))
    delta = attached(model)
    ours = hidden(model(**batch))
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    without = hidden(model(**batch))
    assert (ours - without).abs().max() > 1e-3
    values = delta.state_dict()
    delta.detach()
    assert not torch.equal(hidden(model(**batch)), before)
    dk.attach(model, dk.Prefix(tokens=3)).load_state_dict(values)
    torch.testing.assert_close(hidden(model(**batch)), without, rtol=1e-5, atol=1e-5)


def test_blocks_before_the_first_prefix_keep_their_positions():
    model = build("t5")
    batch = inputs("t5", model)
    states = model(**batch, output_hidden_states=True).encoder_hidden_states
    attached(model, at="encoder.block.1")
    changed = model(**batch, output_hidden_states=True).encoder_hidden_states
    torch.testing.assert_close(states[1], changed[1])
    assert (states[2] - changed[2]).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = build("t5", dropout_rate=0.0).double()
    batch = inputs("t5", model)
    delta = attached(model, reparam=True)
    hidden(model(**batch)).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in delta.parameters()]
    model.zero_grad()
    model.config.use_cache = False
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    hidden(model(**batch)).square().sum().backward()
    for parameter, gradient in zip(delta.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-6)


def test_copies_keep_it():
    model = build("t5")
    batch = inputs("t5", model)
    attached(model)
    output = hidden(model(**batch))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(hidden(twin(**batch)), output)


def test_it_is_alone_in_its_attention():
    model = build("t5")
    batch = inputs("t5", model)
    first = attached(model)
    alone = hidden(model(**batch))
    other = dk.attach(model, dk.Prefix(tokens=2), name="other")
    with pytest.raises(
        dk.StateError, match=r"T5Attention: .*one beside that of delta 'delta'; .*dk\.use\(model, name\)"
    ):
        model(**batch)
    dk.use(model, "delta")
    assert torch.equal(hidden(model(**batch)), alone)
    with pytest.raises(dk.StateError, match=r"acts on the whole batch at .*run its examples in a batch of their own"):
        dk.rows(model, ["delta", None])(**batch)
    dk.use(model, "other")
    usual = hidden(model(**batch))
    torch.testing.assert_close(hidden(dk.rows(model, ["other", "other"])(**batch)), usual, rtol=1e-5, atol=1e-5)
    first.detach()
    other.detach()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_other_attention_is_refused(kind):
    with pytest.raises(
        dk.TargetError, match=r"expects the attention of T5 or mT5, .*use relative_positions='all_blocks'"
    ):
        attached(build(kind))


def test_positions_of_each_block_are_refused():
    """UMT5 has the attributes of T5, and relative positions of its own in each block."""
    config = tf.UMT5Config(vocab_size=19, d_model=12, d_kv=4, d_ff=20, num_layers=1, num_heads=3)
    with pytest.raises(dk.TargetError, match="this is a UMT5Attention"):
        attached(tf.UMT5EncoderModel(config))
