"""A head that nobody has trained yet is not frozen without a word."""

import copy
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

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


PARTS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
STACK = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 100}
AUDIO = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
IMAGES = {"vision_config": PARTS | {"image_size": 32, "patch_size": 16}, "text_config": PARTS | {"vocab_size": 100}}
PATCHES = {"vision_config": PARTS | {"num_patches": 4, "patch_size": 16}, "text_config": PARTS | {"vocab_size": 100}}
NO_BASE = {
    "CLIPForImageClassification": (IMAGES, "classifier", '"@head"'),
    "SiglipForImageClassification": (IMAGES, "classifier", '"@head"'),
    "Siglip2ForImageClassification": (PATCHES, "classifier", '"@head"'),
    "MetaClip2ForImageClassification": (IMAGES, "classifier", '"@head"'),
    "T5ForQuestionAnswering": (STACK, "qa_outputs", '"@head"'),
    "UMT5ForQuestionAnswering": (STACK, "qa_outputs", '"@head"'),
    "WhisperForAudioClassification": (AUDIO, "classifier, projector", '["classifier", "projector"]'),
}
"""Heads beside the parts of a base model that is no module of its own: options of the config, what is new, and the advice."""


def bases_of(name, folder):
    """Returns the class, and the base model of a head's family, which is also saved in the folder."""
    family = name.partition("For")[0]
    base = getattr(tf, f"{family}Model")(getattr(tf, f"{family}Config")(**NO_BASE[name][0]))
    base.save_pretrained(folder)
    return getattr(tf, name), base


@pytest.mark.parametrize("name", NO_BASE)
def test_heads_beside_the_parts_of_their_base_model(name, tmp_path):
    kind, base = bases_of(name, tmp_path)
    _, new, advice = NO_BASE[name]
    dk.attach(base, dk.LoRA(r=2))
    dk.attach(type(base).from_pretrained(tmp_path), dk.LoRA(r=2))
    for model in (kind.from_pretrained(tmp_path), kind(base.config)):
        with pytest.warns(dk.DeltaWarning, match=rf"^{new}: new in this {name} and frozen") as found:
            dk.attach(model, dk.LoRA(r=2)).detach()
        assert f"pass train={advice} to train" in str(found[0].message)
        delta = dk.attach(model, dk.LoRA(r=2), train=eval(advice))
        assert {path.partition(".")[0] for path in delta.fully_trained} == set(new.split(", "))
    delta.detach()
    model.save_pretrained(tmp_path / "whole")
    dk.attach(kind.from_pretrained(tmp_path / "whole"), dk.LoRA(r=2))


def test_what_train_does_not_select_is_named():
    config = tf.WhisperConfig(**AUDIO)
    wanted = r'^projector: new in .*; pass train=\["@head", "projector"\] to train them .* or call requires_grad_\(False\) on '
    model = tf.WhisperForAudioClassification(config)
    with pytest.warns(dk.DeltaWarning, match=wanted):
        dk.attach(model, dk.LoRA(r=2), train="@head").detach()
    delta = dk.attach(model, dk.LoRA(r=2), freeze=False)
    before = snapshot(model)
    with pytest.raises(dk.DeltaWarning, match=wanted):
        delta.freeze(train="@head")
    same(before, snapshot(model))
    delta.freeze(train=["@head", "projector"])
    other = tf.WhisperForAudioClassification(config)
    other.projector.requires_grad_(False)
    dk.attach(other, dk.LoRA(r=2), train="@head")


class Module(nn.Module):
    """A model inside a module of one's own, as in a LightningModule."""

    def __init__(self, **models):
        super().__init__()
        self.models = nn.ModuleDict(models)


def test_heads_inside_a_module_of_one_s_own(base):
    model = Module(a=tf.BertForSequenceClassification.from_pretrained(base / "encoder"))
    wanted = r"^models\.a\.bert\.pooler, models\.a\.classifier: new in this Module and frozen"
    with pytest.warns(dk.DeltaWarning, match=wanted) as found:
        dk.attach(model, dk.LoRA(r=2)).detach()
    train = eval(str(found[0].message).partition("pass train=")[2].partition(" to train")[0])
    assert len(dk.attach(model, dk.LoRA(r=2), train=train).fully_trained) == 4
    dk.attach(Module(a=tf.BertForSequenceClassification.from_pretrained(base / "classifier")), dk.LoRA(r=2))
    dk.attach(Module(a=tf.BertModel.from_pretrained(base / "encoder")), dk.LoRA(r=2))
    # Each model is judged by its own marks.
    own = Module(a=tf.T5ForQuestionAnswering(tf.T5Config(**STACK)))
    own.classifier = nn.Linear(3, 3)
    with pytest.warns(dk.DeltaWarning, match=r'^models\.a\.qa_outputs: new .* pass train="models\.a\.qa_outputs"'):
        dk.attach(own, dk.LoRA(r=2))
    both = Module(a=classifier(), b=tf.BertForSequenceClassification.from_pretrained(base / "classifier"))
    with pytest.warns(dk.DeltaWarning, match=r'^models\.a\.classifier: new .* pass train="@head"'):
        dk.attach(both, dk.LoRA(r=2))
