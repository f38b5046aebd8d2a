"""OpenPrompt's verbalizers: their formulas, in float64."""

import json

import pytest
import torch

from deltakit.errors import DeltaWarning, OptionError
from deltakit.openprompt.prompts import KnowledgeableVerbalizer, ManualVerbalizer, ProtoVerbalizer, SoftVerbalizer
from deltakit.prompting import SlotOutput
from support.prompt_models import model_of, tokenizer_of

TOKENIZER = tokenizer_of("wordpiece")
WORDS = [["yes", "good"], ["no"], ["maybe", "fine", "so"]]
SPLIT = [["yes", "boredom"], ["no"], ["maybe"]]


def ids(word):
    return TOKENIZER.encode(word, add_special_tokens=False)


@pytest.fixture
def logits():
    return torch.randn(5, len(TOKENIZER), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(words, logits, read, prior=None):
    """Loops over examples and words: log p(w) among all label words, and the mean over the words of each class."""
    rows = []
    for row in logits:
        scores = [[read(row[ids(word)]) for word in own] for own in words]
        total = torch.stack([one for own in scores for one in own]).logsumexp(0)
        found = [[one - total for one in own] for own in scores]
        if prior is not None:
            (other,) = by_hand_words(words, prior[None], read)
            found = [[one - two for one, two in zip(a, b, strict=True)] for a, b in zip(found, other, strict=True)]
            total = torch.stack([one for own in found for one in own]).logsumexp(0)
            found = [[one - total for one in own] for own in found]
        rows.append(torch.stack([torch.stack(own).mean() for own in found]))
    return torch.stack(rows)


def by_hand_words(words, logits, read):
    for row in logits:
        scores = [[read(row[ids(word)]) for word in own] for own in words]
        total = torch.stack([one for own in scores for one in own]).logsumexp(0)
        yield [[one - total for one in own] for own in scores]


READ = {"first": lambda found: found[0], "mean": lambda found: found.mean(), "max": lambda found: found.max()}


@pytest.mark.parametrize("words", [WORDS, SPLIT], ids=["words", "split"])
@pytest.mark.parametrize("handler", READ)
def test_scores_are_openprompts(words, handler, logits):
    verbalizer = ManualVerbalizer(TOKENIZER, num_classes=3, label_words=words, multi_token_handler=handler)
    torch.testing.assert_close(verbalizer.process_logits(logits), by_hand(words, logits, READ[handler]))
    prior = logits.mean(0)
    verbalizer.register_calibrate_logits(prior)
    torch.testing.assert_close(verbalizer.process_logits(logits), by_hand(words, logits, READ[handler], prior))


def test_without_the_softmax_over_words(logits):
    verbalizer = ManualVerbalizer(TOKENIZER, num_classes=3, label_words=WORDS, post_log_softmax=False)
    expected = torch.stack([logits[:, [ids(word)[0] for word in own]].mean(1) for own in WORDS], 1)
    torch.testing.assert_close(verbalizer.process_logits(logits), expected)


def test_the_table_of_words():
    verbalizer = ManualVerbalizer(TOKENIZER, num_classes=3, label_words=SPLIT)
    word = ids("boredom")
    assert len(word) > 1
    assert verbalizer.label_words_ids.shape == (3, 2, len(word))
    assert verbalizer.label_words_ids[0, 1].tolist() == word
    assert verbalizer.words_ids_mask[0].tolist() == [[1, *[0] * (len(word) - 1)], [1] * len(word)]
    assert verbalizer.label_words_mask.tolist() == [[1, 1], [1, 0], [1, 0]]
    assert not any(one.requires_grad for one in verbalizer.parameters())


def test_words_as_openprompt_takes_them(tmp_path):
    named = ManualVerbalizer(TOKENIZER, classes=["a", "b"], label_words={"b": ["no"], "a": "yes"})
    assert named.label_words == [["yes"], ["no"]]
    (tmp_path / "words.txt").write_text("yes,good\nno\n\nmaybe\nso,fine\n", encoding="utf-8")
    (tmp_path / "words.json").write_text(json.dumps({"a": ["yes"], "b": ["no", "so"]}), encoding="utf-8")
    text = ManualVerbalizer(TOKENIZER, num_classes=2).from_file(str(tmp_path / "words.txt"), choice=1)
    assert text.label_words == [["maybe"], ["so", "fine"]]
    data = ManualVerbalizer(TOKENIZER, classes=["b", "a"]).from_file(str(tmp_path / "words.json"))
    assert data.label_words == [["no", "so"], ["yes"]]
    with pytest.raises(OptionError, match="choice=2\\): the file has 2 verbalizers, counted from 0"):
        text.from_file(str(tmp_path / "words.txt"), choice=2)
    bytes_ = tokenizer_of("bpe")
    plain = ManualVerbalizer(bytes_, num_classes=2, label_words=["<!>yes", "yes"], multi_token_handler="mean")
    rows = zip(plain.label_words_ids[:, 0].tolist(), plain.words_ids_mask[:, 0].tolist(), strict=True)
    read = [row[: sum(mask)] for row, mask in rows]
    assert bytes_.batch_decode(read) == ["yes", " yes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([["yes"], ["yes"]], "the words 'yes' of class 0 and 'yes' of class 1 have the same ids"),
        ([["yes"], ["☃"]], "the tokenizer does not know the word '☃'"),
    ],
)
def test_what_openprompt_says_nothing_of_is_a_warning(words, message):
    with pytest.warns(DeltaWarning) as told:
        ManualVerbalizer(TOKENIZER, num_classes=2, label_words=words)
    assert message in str(told[0].message)


def test_errors_of_verbalizers():
    for options, message in [
        ({"num_classes": 2, "label_words": [["yes"]]}, "expected words for 2 classes, found"),
        ({"num_classes": 2, "label_words": [["yes"], []]}, "expected words for 2 classes, found"),
        ({"num_classes": 2, "classes": ["a"]}, "num_classes=2, and there are 1 classes"),
        ({"classes": ["a"], "label_words": {"b": "yes"}}, "the words are those of ['b'], and classes= has ['a']"),
    ]:
        with pytest.raises(OptionError) as error:
            ManualVerbalizer(TOKENIZER, **options)
        assert message in str(error.value)
    with pytest.raises(OptionError, match="no label words were set; pass label_words=, or call from_file"):
        _ = ManualVerbalizer(TOKENIZER, num_classes=2).label_words


def test_knowledgeable(logits):
    words = [["yes", "good", "film", "boredom", "☃"], ["no", "bad", "film"]]
    verbalizer = KnowledgeableVerbalizer(TOKENIZER, num_classes=2, label_words=words, max_token_split=1)
    # "film" is a word of both classes, "boredom" is split, and "☃" unknown.
    assert verbalizer.label_words == [["yes", "good"], ["no", "bad"]]
    with torch.no_grad():
        verbalizer.label_words_weights.copy_(torch.tensor([[0.5, -0.25], [1.0, 0.0]]))
    read = next(by_hand_words(verbalizer.label_words, logits[:1], READ["first"]))
    shares = verbalizer.label_words_weights.softmax(-1)
    expected = torch.stack([(shares[label].double() * torch.stack(own)).sum() for label, own in enumerate(read)])
    torch.testing.assert_close(verbalizer.process_logits(logits[:1])[0], expected)
    # "good" and "no" are rare in the slot. A class keeps its first word.
    prior = torch.zeros(len(TOKENIZER), dtype=torch.float64)
    prior[[ids("good")[0], ids("no")[0]]] = -5.0
    verbalizer.candidate_frac = 2 / len(prior)
    verbalizer.register_calibrate_logits(prior)
    assert verbalizer.label_words_mask.tolist() == [[1, 0], [1, 1]]
    found = verbalizer.process_logits(logits)
    assert found.isfinite().all()
    with pytest.raises(OptionError, match="candidate_frac=1.0\\): expected at least 0 and below 1"):
        KnowledgeableVerbalizer(TOKENIZER, num_classes=2, candidate_frac=1.0)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_soft_starts_as_the_rows_of_its_words(kind, logits):
    model, tokenizer = model_of(kind), tokenizer_of({"bert": "wordpiece", "gpt2": "bpe"}[kind])
    verbalizer = SoftVerbalizer(tokenizer, model, num_classes=2, label_words=["word", "film"])
    hidden = torch.randn(3, 1, 28)
    rows = [tokenizer.encode(word, add_special_tokens=False) for word in (" word", " film")]
    head = model.get_output_embeddings()
    scores = torch.stack([head(hidden[:, 0])[:, row].mean(1) for row in rows], 1)
    found = verbalizer.process_outputs(SlotOutput(logits[:3, None], hidden))
    torch.testing.assert_close(found, scores.log_softmax(-1))
    assert verbalizer.group_parameters_1 == []
    assert sum(one.numel() for one in verbalizer.group_parameters_2) == 2 * 28 + 2
    assert SoftVerbalizer(tokenizer, model, classes=["a", "b", "c"]).head.classes == ("a", "b", "c")


def test_prototypes_are_read_once_they_are_trained(logits):
    words = ["yes", "no"]
    verbalizer = ProtoVerbalizer(TOKENIZER, model_of("bert"), num_classes=2, label_words=words, mid_dim=7)
    output = SlotOutput(logits[:, None].float(), torch.randn(5, 1, 28))
    manual = verbalizer.process_logits(logits.float())
    assert torch.equal(verbalizer.process_outputs(output), manual)
    verbalizer.trained = True
    proto = verbalizer.proto(output)

    def scaled(scores):
        return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)

    torch.testing.assert_close(verbalizer.process_outputs(output), (scaled(manual) + scaled(proto)) / 2)
    verbalizer.multi_verb = "proto"
    assert torch.equal(verbalizer.process_outputs(output), proto)
