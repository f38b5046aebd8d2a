"""A head that nobody has trained yet is not frozen without a word."""

import copy
import warnings

import pytest
import torch
import transformers as tf

import deltakit as dk
from support.models import Transformer, randomize, same, snapshot
from support.tiny_transformers import build

WARNING = r'^classifier: new in this BertForSequenceClassification and frozen: .*; pass train="@head" to train them fully .* train=\(\)'


def classifier():
    return build("bert", tf.AutoModelForSequenceClassification)


@pytest.fixture
def base(tmp_path):
    """A folder with an encoder without a pooler, and a folder with a trained classifier."""
    config = build("bert").config
    tf.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    tf.BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    return tmp_path


def test_a_head_outside_the_base_model_is_named():
    model = classifier()
    with pytest.warns(dk.DeltaWarning, match=WARNING):
        delta = dk.attach(model, dk.LoRA(r=2))
    assert not model.classifier.weight.requires_grad
    # It was said once.
    dk.attach(model, dk.BitFit(), name="second").detach()
    delta.detach()
    for train in ("@head", "classifier", "^", ()):
        dk.attach(model, dk.LoRA(r=2), train=train).detach()
    delta = dk.attach(model, dk.LoRA(r=2), freeze=False)
    with pytest.warns(dk.DeltaWarning, match=WARNING):
        delta.freeze()
    delta.detach()
    delta = dk.attach(model, dk.LoRA(r=2), freeze=False).freeze(train=())
    delta.freeze(train="@head")
    assert set(delta.fully_trained) == {"classifier.weight", "classifier.bias"}


def test_a_warning_that_is_an_error_changes_nothing():
    model = classifier()
    before = snapshot(model)
    with pytest.raises(dk.DeltaWarning, match=WARNING):
        dk.attach(model, dk.LoRA(r=2))
    same(before, snapshot(model))


def test_a_head_that_the_user_froze_is_the_user_s():
    model = classifier()
    model.classifier.requires_grad_(False)
    dk.attach(model, dk.LoRA(r=2))


def test_loading_never_warns(tmp_path):
    for train in ("@head", ()):
        model = classifier()
        randomize(dk.attach(model, dk.LoRA(r=2), train=train)).save(tmp_path)
        dk.deltas(model)[0].detach()
        dk.load(tmp_path, model)


def test_what_was_loaded_from_a_checkpoint_is_not_new(base):
    """transformers marks what it loads; the pooler below the new head is named with it."""
    model = tf.BertForSequenceClassification.from_pretrained(base / "encoder")
    with pytest.warns(
        dk.DeltaWarning, match=r'^bert\.pooler, classifier: .* train=\["bert\.pooler", "\^?classifier"\]'
    ):
        dk.attach(model, dk.LoRA(r=2)).detach()
    dk.attach(model, dk.LoRA(r=2), train=["bert.pooler", "classifier"])
    dk.attach(tf.BertForSequenceClassification.from_pretrained(base / "classifier"), dk.LoRA(r=2))
    # An encoder alone has no head: whether its pooler is used is the user's business.
    dk.attach(tf.BertModel.from_pretrained(base / "encoder"), dk.LoRA(r=2))
    other = tf.BertForSequenceClassification.from_pretrained(
        base / "classifier", num_labels=5, ignore_mismatched_sizes=True
    )
    with pytest.warns(dk.DeltaWarning, match=WARNING):
        dk.attach(other, dk.LoRA(r=2))
    with pytest.warns(dk.DeltaWarning, match=WARNING):
        dk.attach(copy.deepcopy(tf.BertForSequenceClassification.from_pretrained(base / "classifier")), dk.LoRA(r=2))
    moved = tf.BertForSequenceClassification.from_pretrained(base / "classifier").to(torch.bfloat16)
    dk.attach(moved, dk.LoRA(r=2))


def test_language_models_have_no_new_head(tmp_path):
    for kind in ("bert", "gpt2", "llama"):
        auto = tf.AutoModelForMaskedLM if kind == "bert" else tf.AutoModelForCausalLM
        model = build(kind, auto)
        dk.attach(model, dk.LoRA(r=2))
        dk.deltas(model)[0].detach()
        model.save_pretrained(tmp_path / kind)
        resized = auto.from_pretrained(tmp_path / kind)
        resized.resize_token_embeddings(resized.config.vocab_size + 7, mean_resizing=False)
        dk.attach(resized, dk.LoRA(r=2))


def test_models_of_one_s_own_are_not_guessed_at():
    dk.attach(Transformer(), dk.LoRA(r=2))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "bart", "gpt2", "llama", "deberta_v2", "electra"])
def test_the_advice_works(kind):
    try:
        model = build(kind, tf.AutoModelForSequenceClassification)
    except (KeyError, ValueError):
        pytest.skip("no tiny config")
    with pytest.warns(dk.DeltaWarning, match="frozen") as found:
        dk.attach(model, dk.LoRA(r=2)).detach()
    train = eval(str(found[0].message).partition("pass train=")[2].partition(" to train")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta = dk.attach(model, dk.LoRA(r=2), train=train)
    outside = {id(p) for p in model.parameters()} - {id(p) for p in model.base_model.parameters()}
    assert outside == {id(p) for name, p in delta.named_parameters() if ".lora." not in name}


def test_the_printout_says_what_a_large_head_costs():
    model = build("llama", tf.AutoModelForCausalLM)
    head, total = model.lm_head.weight.numel(), sum(p.numel() for p in model.parameters())
    wanted = f"  {'fully trained':<32} {'':>12}   {head:,}, {100 * head / total:.3g} % of the backbone"
    assert wanted in repr(dk.plan(model, dk.LoRA(r=2), train="@head")).splitlines()
    assert wanted in repr(dk.attach(model, dk.LoRA(r=2), train="@head")).splitlines()
