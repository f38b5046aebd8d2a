"""MixedVerbalizer: the formula in float64, training, calibration, and files."""

import json
import statistics

import pytest
import torch

import deltakit as dk
from deltakit.core import StoredExtra
from deltakit.errors import CheckpointError, OptionError
from deltakit.openprompt.prompts import ProtoVerbalizer
from deltakit.prompting import (
    KnowledgeableVerbalizer,
    MixedVerbalizer,
    PromptModel,
    PrototypicalVerbalizer,
    RuleVerbalizer,
    SlotOutput,
    SoftVerbalizer,
    Template,
    Verbalizer,
    WordVerbalizer,
)
from support.models import randomize
from support.prompt_models import REVIEW, REVIEWS, model_of, tokenizer_of

TOKENIZER = tokenizer_of("wordpiece")
THREE = {"good": ["good", "great"], "bad": "bad", "film": "film"}
WORDS = {"good": ["good", "great"], "bad": ["bad", "awful"], "film": ["film"]}
BATCH, D = 5, 28


def output(slots=1):
    """What a backbone computes for a batch, in float64."""
    vocabulary = len(TOKENIZER) + 3
    return SlotOutput(torch.randn(BATCH, slots, vocabulary).double() * 3, torch.randn(BATCH, slots, D).double())


def three():
    return WordVerbalizer(TOKENIZER, THREE), PrototypicalVerbalizer(model_of("bert").double(), list(THREE), size=7)


def test_the_formula():
    """The mean of the scores, each less their mean and over their standard deviation (n - 1)."""
    words, prototypes = three()
    # Word scores a hundred times the cosines: added up without being standardized, they would decide alone.
    out = output()
    out = out._replace(logits=out.logits * 100)
    found = MixedVerbalizer([words, prototypes])(out)
    cosines = torch.nn.functional.cosine_similarity(
        (out.hidden[:, 0] @ prototypes.projection.T)[:, None], prototypes.prototypes, dim=-1
    )
    for row in range(BATCH):
        columns = []
        for scores in (words(out)[row].tolist(), cosines[row].tolist()):
            mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
            columns.append([(score - mean) / deviation for score in scores])
        expected = torch.tensor([sum(pair) / 2 for pair in zip(*columns, strict=True)], dtype=torch.float64)
        torch.testing.assert_close(found[row], expected.log_softmax(-1), rtol=1e-10, atol=1e-10)


def test_it_is_openprompts_mixture():
    model = model_of("bert")
    theirs = ProtoVerbalizer(TOKENIZER, model, list(THREE), label_words=[["good"], ["bad"], ["film"]])
    theirs.trained = True
    prototypes = PrototypicalVerbalizer(model, list(THREE))
    prototypes.load_state_dict(theirs.proto.state_dict())
    mine = MixedVerbalizer([WordVerbalizer(TOKENIZER, {name: name for name in THREE}), prototypes])
    out = SlotOutput(*(tensor.float() for tensor in output()[:2]))
    torch.testing.assert_close(mine(out), theirs.process_outputs(out).log_softmax(-1))


def test_neither_units_nor_order_matter_and_equal_scores_say_nothing():
    words, prototypes = three()
    out = output()
    found = MixedVerbalizer([words, prototypes])(out)
    torch.testing.assert_close(MixedVerbalizer([prototypes, words])(out), found)

    class Same(Verbalizer):
        def forward(self, output):
            return torch.zeros(len(output.logits), len(self.classes), dtype=output.logits.dtype).log_softmax(-1)

        def to_dict(self):
            return {"kind": "same"}

    with_none = MixedVerbalizer([words, Same(list(THREE))])(out)
    alone = words(out)
    expected = (alone - alone.mean(1, keepdim=True)) / alone.std(1, keepdim=True) / 2
    torch.testing.assert_close(with_none, expected.log_softmax(-1))


def test_the_loss_is_the_sum_of_their_losses():
    words, prototypes = three()
    labels, out = torch.tensor([0, 1, 2, 0, 1]), output()
    mixed = MixedVerbalizer([words, prototypes])
    torch.testing.assert_close(mixed.loss(out, labels), words.loss(out, labels) + prototypes.loss(out, labels))
    loss, scores = mixed.loss_and_scores(out, labels)
    assert torch.equal(loss, mixed.loss(out, labels))
    assert torch.equal(scores, mixed(out))
    loss.backward()
    assert prototypes.prototypes.grad.abs().sum() > 0


def test_words_are_calibrated_in_it():
    model = model_of("bert")
    template = Template(REVIEW, TOKENIZER, model)
    words = WordVerbalizer(TOKENIZER, WORDS)
    more = KnowledgeableVerbalizer(
        TOKENIZER, {"good": ["fine", "so"], "bad": ["plot", "bad"], "film": ["film", "word"]}
    )
    mixed = PromptModel(model, template, MixedVerbalizer([words, PrototypicalVerbalizer(model, list(WORDS)), more]))
    mixed.calibrate(REVIEWS)
    for own in (WordVerbalizer(TOKENIZER, WORDS), KnowledgeableVerbalizer(TOKENIZER, more.words_by_class())):
        PromptModel(model, template, own).calibrate(REVIEWS)
        assert torch.equal(own.prior, (words if type(own) is WordVerbalizer else more).prior)
    soft = MixedVerbalizer([SoftVerbalizer(model, list(WORDS)), PrototypicalVerbalizer(model, list(WORDS))])
    with pytest.raises(OptionError, match="MixedVerbalizer: it has no words, so it cannot be calibrated"):
        PromptModel(model, template, soft).calibrate(REVIEWS)


def test_rules_of_several_slots_are_calibrated_in_it():
    model = model_of("bert")
    template = Template('{"placeholder": "text"} {"mask"} {"mask"}', TOKENIZER, model)
    one = RuleVerbalizer(TOKENIZER, {"good": ["film", "good"], "bad": ["film", "bad"], "film": ["film", "it"]})
    two = RuleVerbalizer(TOKENIZER, {"good": ["plot", "great"], "bad": ["word", "awful"], "film": ["a", "it"]})
    mixed = PromptModel(model, template, MixedVerbalizer([one, two]))
    mixed.calibrate(REVIEWS)
    priors = [slot.prior for own in (one, two) for slot in own.slots]
    assert all(float(prior.abs().sum()) > 0 for prior in priors)
    assert not torch.equal(priors[0], priors[2])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_each_reads_the_scores_of_its_own_words(kind):
    model, tokenizer = model_of(kind), tokenizer_of("wordpiece" if kind == "bert" else "bpe")
    template = Template(REVIEW, tokenizer, model, max_length=32)
    words = [
        {"good": ["good", "remember it"], "bad": "bad", "film": "film"},
        {"good": "great", "bad": ["boring plot", "awful"], "film": "word"},
    ]
    members = [WordVerbalizer(tokenizer, own, multi="score") for own in words]
    mixed = MixedVerbalizer([members[0], PrototypicalVerbalizer(model, list(WORDS)), members[1]])
    assert len(mixed.scored_words) == 8
    batch = template.collate([{"text": one["text"]} for one in REVIEWS])
    whole = PromptModel(model, template, mixed).eval()(**batch)["logits"]
    each = [PromptModel(model, template, own).eval()(**batch)["logits"] for own in mixed.members]
    z = [(own - own.mean(1, keepdim=True)) / own.std(1, keepdim=True) for own in each]
    torch.testing.assert_close(whole, torch.stack(z).mean(0).log_softmax(-1))


def trained():
    """A prompt model with a delta, both with random values."""
    model = model_of("bert")
    template = Template(REVIEW, TOKENIZER, model)
    delta = randomize(dk.attach(model, dk.LoRA(r=2)))
    members = [WordVerbalizer(TOKENIZER, WORDS), PrototypicalVerbalizer(model, list(WORDS), size=5)]
    prompt = PromptModel(model, template, MixedVerbalizer(members))
    prompt.calibrate(REVIEWS)
    return prompt.eval(), delta


def test_a_delta_gives_it_back(tmp_path):
    model, delta = trained()
    delta.save(tmp_path)
    other = PromptModel.from_delta(dk.load(tmp_path, model_of("bert")), TOKENIZER)
    assert isinstance(other.verbalizer, MixedVerbalizer)
    assert other.verbalizer.to_dict() == model.verbalizer.to_dict()
    assert other.predict(REVIEWS) == model.predict(REVIEWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own["members"][1].update(size=10**9), r"members\[1\].size: it says 1000000000, and its tensors"),
        (lambda own: own["members"][1].update(kind="mixed"), r"members\[1\]: found the kind 'mixed', and deltakit has"),
        (lambda own: own["members"].pop(), "expected at least two verbalizers"),
        (lambda own: own.update(members=5), "members"),
        (lambda own: own.pop("members"), "members"),
        (lambda own: own["members"][1].update(classes=["a", "b", "c"]), "write the same classes in the same order"),
    ],
)
def test_damaged_files(change, message):
    model, delta = trained()
    data = json.loads(json.dumps(delta._record.extras["prompting"].data()))
    change(data["verbalizer"])
    delta._record.extras["prompting"] = StoredExtra(data, dict(model.verbalizer.state_dict()))
    with pytest.raises(CheckpointError, match=message):
        PromptModel.from_delta(delta, TOKENIZER)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda one: [one], "expected at least two verbalizers, none of them mixed; list all of them here"),
        (lambda one: [one, MixedVerbalizer([one, one])], "none of them mixed"),
        (lambda one: [one, WordVerbalizer(TOKENIZER, dict(reversed(WORDS.items())))], "in the same order"),
        (lambda one: [one, RuleVerbalizer(TOKENIZER, {name: ("it", name) for name in WORDS})], "as many slots"),
        (
            lambda _: [WordVerbalizer(TOKENIZER, {"a": "a", "it": "it"})] * 2,
            "at least three classes, found 2: with two, .* are tied; use an Ensemble of PromptModels",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(OptionError, match=message):
        MixedVerbalizer(make(WordVerbalizer(TOKENIZER, WORDS)))
