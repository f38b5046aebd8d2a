"""Trainable tokens against the formula in float64, against PEFT, tied weights, mixed batches, merging and bad ids."""

import copy
import re
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.methods.trainable_tokens import TiedTokensDelta, TrainableTokensDelta, TrainableTokensPatchDelta
from support.changed_weights import changed_by_hand
from support.models import Transformer, ids, randomize, same, snapshot
from support.tiny_transformers import build

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
TOKENS = (89, 5, 11)

CAUSAL, SEQ2SEQ = tf.AutoModelForCausalLM, tf.AutoModelForSeq2SeqLM
MODELS = {
    "llama": (CAUSAL, ["model.embed_tokens"], TrainableTokensDelta),
    "gpt2": (CAUSAL, ["lm_head", "transformer.wte"], TiedTokensDelta),
    "t5": (SEQ2SEQ, ["decoder.embed_tokens", "encoder.embed_tokens", "lm_head", "shared"], TiedTokensDelta),
    # Their embeddings multiply the rows by a constant.
    "bart": (SEQ2SEQ, ["model.shared.weight"], TrainableTokensPatchDelta),
    "gemma3_text": (CAUSAL, ["model.embed_tokens.weight"], TrainableTokensPatchDelta),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def made(kind):
    return build(kind, MODELS[kind][0], **({"scale_embedding": True} if kind == "bart" else {})).double()


def logits(model):
    tokens = torch.tensor([[5, 3, 89, 7, 5], [11, 0, 30, 8, 2]])
    more = {"decoder_input_ids": tokens[:, :4]} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, **more).logits


class TestFormula:
    def test_an_embedding(self):
        model = nn.Sequential(nn.Embedding(13, 7)).double()
        delta = randomize(dk.attach(model, dk.TrainableTokens(ids=[11, 2, 5], at="0")))
        assert delta.methods[0].ids == (2, 5, 11)
        rows = delta.state_dict()["0.trainable_tokens.rows"]
        assert rows.shape == (3, 7)
        tokens = torch.tensor([[11, 0, 5, 12], [2, 2, 3, 4]])
        weight = model[0].weight.detach().clone()
        weight[[2, 5, 11]] += rows
        assert torch.equal(model(tokens), weight[tokens])
        delta.scale = 0.5
        torch.testing.assert_close(model(tokens), model[0].weight[tokens].lerp(weight[tokens], 0.5), **CLOSE)

    def test_a_linear_layer(self):
        model, x = nn.Sequential(nn.Linear(7, 13)).double().eval(), torch.randn(2, 3, 7, dtype=torch.float64)
        delta = randomize(dk.attach(model, dk.TrainableTokens(ids=[12, 4], at="0")))
        weight = model[0].weight.detach().clone()
        weight[[4, 12]] += delta.state_dict()["0.trainable_tokens.rows"]
        expected = x @ weight.T + model[0].bias
        torch.testing.assert_close(model(x), expected, **CLOSE)
        torch.testing.assert_close(delta.merge().backbone(x), expected, **CLOSE)

    @every_model
    def test_whole_models(self, kind):
        model, (_, targets, module) = made(kind).requires_grad_(False), MODELS[kind]
        before, bare = snapshot(model), logits(model)
        delta = dk.attach(model, dk.TrainableTokens(ids=TOKENS))
        assert sorted(delta.modules) == targets
        assert {type(one) for found in delta.modules.values() for one in found} == {module}
        assert delta.num_parameters == 3 * 24
        assert torch.equal(logits(model), bare)
        randomize(delta)
        changed, found = changed_by_hand(model, delta), logits(model)
        torch.testing.assert_close(found, logits(changed), **CLOSE)
        assert not torch.allclose(found, bare)
        torch.testing.assert_close(logits(delta.merge().backbone), found, **CLOSE)
        delta.unmerge().detach()
        same(before, snapshot(model))
        assert torch.equal(logits(model), bare)


@every_model
def test_outputs_and_gradients_are_pefts(kind):
    peft = pytest.importorskip("peft")
    model = made(kind)
    delta = randomize(dk.attach(model, dk.TrainableTokens(ids=TOKENS)))
    (rows,) = delta.parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(made(kind), peft.TrainableTokensConfig(token_indices=sorted(TOKENS))).eval()
    (theirs,) = {id(p): p for p in other.parameters() if p.requires_grad}.values()
    with torch.no_grad():
        theirs.add_(rows)
    found, expected = logits(model), logits(other)
    torch.testing.assert_close(found, expected, **CLOSE)
    found.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(rows.grad, theirs.grad, **CLOSE)
    assert rows.grad.any(1).all()


def test_a_row_of_padding_gets_no_gradient_from_look_ups():
    model = nn.Sequential(nn.Embedding(13, 7, padding_idx=4))
    (rows,) = randomize(dk.attach(model, dk.TrainableTokens(ids=[2, 4], at="0"))).parameters()
    out = model(torch.tensor([[2, 4, 4]]))
    assert torch.equal(out[0, 1], model[0].weight[4] + rows[1])
    out.sum().backward()
    assert torch.equal(rows.grad, torch.tensor([[1.0], [0.0]]).expand(2, 7))


def test_a_tied_weight_can_be_left_alone():
    model = made("gpt2")
    delta = randomize(dk.attach(model, dk.TrainableTokens(ids=TOKENS, untie=True)))
    assert list(delta.modules) == ["transformer.wte"]
    with pytest.raises(dk.StateError, match=r"tied to lm_head\.weight: merging would change both"):
        delta.merge()
    delta.detach()
    part = randomize(dk.attach(model, dk.TrainableTokens(ids=TOKENS, exclude="lm_head")))
    assert list(part.modules) == ["transformer.wte"]
    with pytest.raises(dk.StateError, match=r"tied to lm_head\.weight: merging would change both"):
        part.merge()


def test_untied_is_one_of_several_embeddings():
    """Of T5 the first is never called."""
    model = made("t5")
    with pytest.raises(
        dk.TargetError, match=r"shared: encoder\.embed_tokens and decoder\.embed_tokens share its weight"
    ):
        dk.attach(model, dk.TrainableTokens(ids=TOKENS, untie=True))
    delta = dk.attach(model, dk.TrainableTokens(ids=TOKENS, untie=True, at="encoder.embed_tokens"))
    assert list(delta.modules) == ["encoder.embed_tokens"]


def test_one_of_several_modules_with_a_weight_may_stay_uncalled():
    model = made("t5").requires_grad_(False)
    delta = randomize(dk.attach(model, dk.TrainableTokens(ids=TOKENS)))
    tokens = torch.tensor([[5, 3, 89]])
    found = model.encoder(input_ids=tokens).last_hidden_state
    expected = changed_by_hand(model, delta).encoder(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_each_example_may_have_its_own(kind):
    model = made(kind).requires_grad_(False)
    bare, outs = logits(model), {}
    for name, tokens in (("a", TOKENS), ("b", (0, 30))):
        delta = randomize(dk.attach(model, dk.TrainableTokens(ids=tokens), name=name))
        outs[name] = logits(model)
        delta.active = False
    for delta in dk.deltas(model):
        delta.active = True
    with dk.rows(model, ["b", "a"]):
        found = logits(model)
    torch.testing.assert_close(found, torch.stack([outs["b"][0], outs["a"][1]]), **CLOSE)
    with dk.rows(model, ["a", None]):
        found = logits(model)
    torch.testing.assert_close(found, torch.stack([outs["a"][0], bare[1]]), **CLOSE)


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_saving_copies_and_sums_keep_weights_tied(kind, tmp_path):
    model, fresh = made(kind), made(kind)
    delta = randomize(dk.attach(model, dk.TrainableTokens(ids=TOKENS), name="a"))
    expected = logits(model)
    assert len(delta.state_dict()) == 1
    loaded = dk.load(delta.save(tmp_path), fresh)
    assert torch.equal(logits(fresh), expected)
    twin = copy.deepcopy(fresh)
    randomize(loaded)
    assert torch.equal(logits(twin), expected)
    other = randomize(dk.attach(model, dk.TrainableTokens(ids=(5, 60)), name="b"))
    both = logits(model)
    mean = dk.combine(model, {"a": 1.0, "b": 1.0}, name="c").delta
    assert mean.methods[0].ids == (5, 11, 60, 89)
    delta.detach()
    other.detach()
    mean.attach()
    torch.testing.assert_close(logits(model), both, **CLOSE)
    torch.testing.assert_close(logits(mean.merge().backbone), both, **CLOSE)


def test_a_model_that_is_built_without_values():
    with torch.device("meta"):
        model = Transformer()
    delta = dk.attach(model, dk.TrainableTokens(ids=TOKENS[1:]))
    (module,) = delta.modules["embed"]
    model.to_empty(device="cpu")
    assert module.ids.tolist() == [5, 11]


BAD = {
    "none": ({"ids": []}, "TrainableTokens(ids=[]): expected at least one token id"),
    "negative": ({"ids": [3, -1]}, "TrainableTokens(ids=[3, -1]): expected token ids of at least 0"),
    "twice": (
        {"ids": [7, 3, 7, 5]},
        "TrainableTokens(ids=[7, 3, 7, ...]): expected each id once, found [7] several times; write ids=sorted(set(ids))",
    ),
    "text": ({"ids": "abc"}, "TrainableTokens(ids='abc'): expected a list of whole numbers"),
    "numbers": ({"ids": [1.5]}, "TrainableTokens(ids=...): expected a list of whole numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_ids(case):
    options, message = BAD[case]
    with pytest.raises(dk.OptionError, match=re.escape(message)):
        dk.TrainableTokens(**options)


def test_bad_targets():
    model = Transformer()
    with pytest.raises(
        dk.OptionError,
        match=r"embed: TrainableTokens\(ids=\[3, 31, 40\]\) has \[31, 40\], and there are only the ids 0 to 30; resize",
    ):
        dk.attach(model, dk.TrainableTokens(ids=[40, 3, 31]))
    with pytest.raises(
        dk.TargetError,
        match=r"norm: TrainableTokens trains rows of an Embedding or of a Linear layer, found a LayerNorm",
    ):
        dk.attach(model, dk.TrainableTokens(ids=[3], at="norm"))
    with pytest.raises(dk.TargetError, match=r"found bias of a Linear; omit at="):
        dk.attach(model, dk.TrainableTokens(ids=[3], at="classifier.bias"))
    with pytest.raises(dk.TargetError, match="no embedding of token ids; select a layer with at="):
        dk.attach(nn.Sequential(nn.Linear(3, 5)), dk.TrainableTokens(ids=[3]))
    model.embed.max_norm = 1.0
    with pytest.raises(dk.TargetError, match="embed: TrainableTokens expects an embedding without max_norm"):
        dk.attach(model, dk.TrainableTokens(ids=[3]))
    assert not dk.deltas(model)
    assert model(ids()).shape == (3, 3)
