"""Which template and verbalizer a delta keeps: with several models on one backbone, in models that were
pickled, and with another tokenizer.
"""

import io
import json

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer

import deltakit as dk
from deltakit.core import StoredExtra
from deltakit.errors import CheckpointError, OptionError
from deltakit.prompting import Ensemble, PromptModel, RuleVerbalizer, SoftVerbalizer, Template, WordVerbalizer
from support.prompt_models import REVIEW, REVIEWS, WORDS, model_of, tokenizer_of

TOKENIZER = tokenizer_of("wordpiece")
OTHER = '{"mask"} : {"placeholder": "text"}'


def attached():
    backbone = model_of("bert")
    return backbone, dk.attach(backbone, dk.LoRA(r=2))


def prompt_model(backbone, text=REVIEW):
    return PromptModel(backbone, Template(text, TOKENIZER, backbone), WordVerbalizer(TOKENIZER, WORDS))


def step(model):
    model.train()
    model(**model.collate(REVIEWS))["loss"].backward()


def kept(delta):
    return delta._record.extras["prompting"].data()["template"]["text"]


def test_the_last_model_that_was_made_before_any_training():
    backbone, delta = attached()
    prompt_model(backbone)
    prompt_model(backbone, OTHER)
    assert kept(delta) == OTHER


@pytest.mark.parametrize("fit", [step, lambda model: model.calibrate(REVIEWS)], ids=["trained", "calibrated"])
def test_a_model_that_is_made_to_compare_with_does_not_replace_the_one_of_the_training(fit):
    backbone, delta = attached()
    model = prompt_model(backbone)
    fit(model)
    other = prompt_model(backbone, OTHER)
    other.predict(REVIEWS)
    assert kept(delta) == REVIEW
    Ensemble([model, other]).eval().predict(REVIEWS)
    assert kept(delta) == REVIEW
    step(other)
    assert kept(delta) == OTHER
    model.keep_with(delta)
    assert kept(delta) == REVIEW


def test_a_model_that_is_made_beside_a_loaded_one(tmp_path):
    backbone, delta = attached()
    model = prompt_model(backbone)
    step(model)
    torch.optim.SGD(delta.parameters(), lr=1.0).step()
    delta.save(tmp_path)
    fresh = model_of("bert")
    loaded = dk.load(tmp_path, fresh)
    prompt_model(fresh, OTHER)
    assert kept(loaded) == REVIEW
    PromptModel.from_delta(loaded, TOKENIZER)
    prompt_model(fresh, OTHER)
    assert kept(loaded) == REVIEW


def test_a_pickled_model_saves_what_it_learns_afterwards(tmp_path):
    backbone, _ = attached()
    template = Template(REVIEW, TOKENIZER, backbone)
    file = io.BytesIO()
    torch.save(PromptModel(backbone, template, SoftVerbalizer(backbone, ["good", "bad"])), file)
    file.seek(0)
    restored = torch.load(file, weights_only=False)
    with torch.no_grad():
        restored.verbalizer.vectors.mul_(-3)
    (delta,) = dk.deltas(restored.backbone)
    step(restored)
    torch.optim.SGD(delta.parameters(), lr=1.0).step()
    delta.save(tmp_path)
    again = PromptModel.from_delta(dk.load(tmp_path, model_of("bert")), TOKENIZER)
    assert torch.equal(again.verbalizer.vectors, restored.verbalizer.vectors)
    assert again.eval().predict(REVIEWS) == restored.eval().predict(REVIEWS)


def respelled(shift):
    """A tokenizer as TOKENIZER, whose words have the ids of others."""
    text = json.loads(TOKENIZER.backend_tokenizer.to_str())
    words = text["model"]["vocab"]
    ordinary = [word for word, one in words.items() if one > 4]
    moved = dict(zip(ordinary, [words[word] for word in ordinary[shift:] + ordinary[:shift]], strict=True))
    text["model"]["vocab"] = {**words, **moved}
    names = {
        name: getattr(TOKENIZER, name) for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    return tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)), **names)


@pytest.mark.parametrize(
    ("text", "what"), [(REVIEW, "the template"), ('{"placeholder": "text"} {"mask"}', "label words")]
)
def test_another_tokenizer_is_noticed(text, what):
    backbone, delta = attached()
    model = prompt_model(backbone, text)
    assert PromptModel.from_delta(delta, respelled(0)).predict(REVIEWS) == model.eval().predict(REVIEWS)
    with pytest.raises(CheckpointError, match=f"this tokenizer gives {what} other ids than in training"):
        PromptModel.from_delta(delta, respelled(1))
    # Files that were written without ids are read as they are.
    data = {name: part for name, part in delta._record.extras["prompting"].data().items() if name != "ids"}
    delta._record.extras["prompting"] = StoredExtra(data, {"prior": torch.zeros(4)})
    PromptModel.from_delta(delta, respelled(1))


def test_a_template_and_a_verbalizer_of_different_tokenizers():
    backbone, _ = attached()
    template = Template(REVIEW, TOKENIZER, backbone)
    for verbalizer in (
        WordVerbalizer(respelled(1), WORDS),
        RuleVerbalizer(respelled(1), {"good": ["good"], "bad": ["bad"]}),
    ):
        with pytest.raises(
            OptionError, match=r"the word 'good' has the ids \[\d+\] by the verbalizer's tokenizer, and"
        ):
            PromptModel(backbone, template, verbalizer)


def test_a_call_without_gradients_is_no_training():
    backbone, delta = attached()
    step(prompt_model(backbone))
    other = prompt_model(backbone, OTHER).train()
    with torch.no_grad():
        other(**other.collate(REVIEWS))
    assert kept(delta) == REVIEW
