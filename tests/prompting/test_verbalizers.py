"""Verbalizers in float64 beside their formulas, and their behaviour at the edges."""

import math

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from deltakit.errors import OptionError, TargetError
from deltakit.prompting import (
    KnowledgeableVerbalizer,
    PrototypicalVerbalizer,
    RuleVerbalizer,
    SlotOutput,
    SoftVerbalizer,
    Verbalizer,
    WordVerbalizer,
)
from support.prompt_models import WORDS, model_of, tokenizer_of

TOKENIZER = tokenizer_of("wordpiece")
BATCH, D = 5, 28


def output(slots=1, batch=BATCH):
    """What a backbone computes for a batch, in float64."""
    vocabulary = len(TOKENIZER) + 3
    return SlotOutput(torch.randn(batch, slots, vocabulary).double() * 3, torch.randn(batch, slots, D).double())


def one_id(word):
    (found,) = TOKENIZER(word, add_special_tokens=False)["input_ids"]
    return found


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def log_softmax(values):
    total = math.log(sum(math.exp(value) for value in values))
    return [value - total for value in values]


def test_words():
    """log p(w) over all words of all classes; log p(class) = log_softmax of their means."""
    found, out = WordVerbalizer(TOKENIZER, {"good": ["good", "great", "fine"], "bad": "bad"}), output()
    for row in range(BATCH):
        logit = {word: out.logits[row, 0, one_id(word)].item() for word in ("good", "great", "fine", "bad")}
        *good, bad = log_softmax(logit.values())
        close(found(out)[row], torch.tensor(log_softmax([sum(good) / 3, bad]), dtype=torch.float64))


def test_the_mean_of_the_tokens_of_a_word():
    words = {"film": "remember it", "plot": "bad"}
    found, out = WordVerbalizer(TOKENIZER, words, multi="mean"), output()
    first, second = one_id("remember"), one_id("it")
    expected = (out.logits[:, 0, first] + out.logits[:, 0, second]) / 2
    close(found(out), torch.stack([expected, out.logits[:, 0, one_id("bad")]], 1).log_softmax(-1))


def test_the_first_token_of_a_word():
    found, out = WordVerbalizer(TOKENIZER, {"film": "remember it", "plot": "bad"}, multi="first"), output()
    close(found(out), out.logits[:, 0, [one_id("remember"), one_id("bad")]].log_softmax(-1))


def test_contextual_calibration():
    """Zhao et al. 2021: p(w | x) / p(w | content-free), normalized. The prior is a mean of probabilities."""
    found, out, free = WordVerbalizer(TOKENIZER, WORDS), output(), output(batch=3)
    found.calibrate(*found.observed(free))
    ids = [one_id(word) for word in ("good", "great", "bad", "awful")]
    prior = free.logits[:, 0].softmax(-1)[:, ids].mean(0)
    p = out.logits[:, 0].softmax(-1)[:, ids] / prior.float()
    words = (p / p.sum(1, keepdim=True)).log()
    expected = torch.stack([words[:, :2].mean(1), words[:, 2:].mean(1)], 1).log_softmax(-1)
    torch.testing.assert_close(found(out), expected, rtol=1e-6, atol=1e-6)


def test_a_calibrated_word_is_neutral_where_the_prior_was_measured():
    found, free = WordVerbalizer(TOKENIZER, WORDS), output(batch=1)
    found.calibrate(*found.observed(free))
    torch.testing.assert_close(found(free).exp(), torch.full((1, 2), 0.5).double(), rtol=1e-6, atol=1e-6)


def test_learned_weights_of_words():
    """Hu et al. 2022, section 3.3: the mean of the words' log-probabilities with weights softmax(w) in each class."""
    found, out = KnowledgeableVerbalizer(TOKENIZER, WORDS).double(), output()
    close(found(out), WordVerbalizer(TOKENIZER, WORDS)(out))
    with torch.no_grad():
        found.weights.copy_(torch.tensor([0.5, -1.0, 2.0, 0.3]))
    words = out.logits[:, 0, [one_id(word) for word in ("good", "great", "bad", "awful")]].log_softmax(-1)
    w = found.weights.exp()
    good = (w[0] * words[:, 0] + w[1] * words[:, 1]) / (w[0] + w[1])
    bad = (w[2] * words[:, 2] + w[3] * words[:, 3]) / (w[2] + w[3])
    close(found(out), torch.stack([good, bad], 1).log_softmax(-1))
    found.loss(out, torch.zeros(BATCH, dtype=torch.long)).backward()
    assert found.weights.grad.abs().min() > 0
    assert KnowledgeableVerbalizer(TOKENIZER, WORDS, learn_weights=False).weights is None


def test_words_are_dropped_by_their_prior_and_their_relevance():
    """Hu et al. 2022, section 3.2: R(v) = cos(q_v, q_name) (C - 1) / sum over other classes of the same, dropped below 1."""
    words = {"good": ["good", "great", "fine", "city"], "bad": ["bad", "awful", "boring"]}
    found = KnowledgeableVerbalizer(TOKENIZER, words)
    # Examples 0 and 1 are good, 2 and 3 bad. "fine" goes with the bad ones, and "city" is rare.
    p = torch.tensor(
        [
            [0.4, 0.3, 0.1, 1e-6, 0.1, 0.1, 0.1],
            [0.3, 0.4, 0.1, 1e-6, 0.1, 0.1, 0.1],
            [0.1, 0.1, 0.4, 1e-6, 0.4, 0.3, 0.3],
            [0.1, 0.1, 0.3, 1e-6, 0.3, 0.4, 0.3],
        ]
    )
    found.refine(p.log(), drop=1 / 7)
    assert found.dropped() == ["fine", "city"]
    torch.testing.assert_close(found.prior, p.mean(0).log())
    out = output()
    ids = [one_id(word) for word in ("good", "great", "bad", "awful", "boring")]
    kept = (out.logits[:, 0, ids] - p.mean(0).log()[[0, 1, 4, 5, 6]]).log_softmax(-1)
    expected = torch.stack([kept[:, :2].mean(1), kept[:, 2:].mean(1)], 1).log_softmax(-1)
    torch.testing.assert_close(found(out), expected, rtol=1e-6, atol=1e-6)
    # The name of a class stays, however rare.
    found.refine(p.flip(1).log(), drop=0.9)
    assert "good" not in found.dropped()
    with pytest.raises(OptionError, match=r"refine\(drop=1\): expected the share of words to drop"):
        found.refine(p.log(), drop=1)


def test_relevance_among_three_classes():
    """R(v) = cos(q_v, q_own) (C - 1) / sum over the other classes, word by word."""
    words = {"good": ["good", "great", "fine"], "bad": ["bad", "awful", "boring"], "place": ["city", "film", "plot"]}
    found = KnowledgeableVerbalizer(TOKENIZER, words)
    p = torch.rand(7, 9).double()
    found.refine(p.log(), drop=0)
    names, dropped = [0, 3, 6], []
    for index, one in enumerate(found.label_words):
        cosines = [nn.functional.cosine_similarity(p[:, index], p[:, name], 0).item() for name in names]
        own = cosines.pop(one.label)
        if own * 2 / sum(cosines) < 1 and index not in names:
            dropped.append(one.word)
    assert found.dropped() == dropped
    assert 0 < len(dropped) < 6


def test_class_vectors():
    """Hambardzumyan et al. 2021: log_softmax(V h + b). V starts as the rows of words in the head."""
    model, out = model_of("bert").double(), output()
    head = model.get_output_embeddings()
    found = SoftVerbalizer(model, {"good": ["good", "great"], "bad": "bad"}, tokenizer=TOKENIZER)
    good = [one_id("good"), one_id("great")]
    close(found.vectors[0].detach(), head.weight[good].mean(0).detach())
    close(found.vectors[1].detach(), head.weight[one_id("bad")].detach())
    with torch.no_grad():
        found.vectors.normal_()
        found.bias.normal_()
    close(found(out), (out.hidden[:, 0] @ found.vectors.T + found.bias).log_softmax(-1))
    fresh = SoftVerbalizer(model, ["good", "bad"])
    assert fresh.classes == ("good", "bad")
    assert 0.001 < fresh.vectors.std() < 0.05


def test_untrained_class_vectors_are_the_words():
    """With one word a class, a soft verbalizer starts as the manual one."""
    model = model_of("bert").double()
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    hidden = torch.randn(BATCH, 1, D).double()
    out = SlotOutput(model.get_output_embeddings()(hidden), hidden)
    words = {"good": "good", "bad": "awful"}
    close(
        SoftVerbalizer(model, words, tokenizer=TOKENIZER)(out).detach(), WordVerbalizer(TOKENIZER, words)(out).detach()
    )


def test_prototypes():
    """Cui et al. 2022, section 3.2: cosines with prototypes, and two contrastive losses."""
    found, out = PrototypicalVerbalizer(model_of("bert").double(), ["a", "b", "c"], size=11), output(batch=6)
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    v = out.hidden[:, 0] @ found.projection.T
    cosine = nn.functional.cosine_similarity
    scores = torch.stack([cosine(v, prototype[None]) for prototype in found.prototypes], 1)
    close(found(out), scores.log_softmax(-1))
    between = []
    for i in range(6):
        others = sum(cosine(v[i], v[n], 0).exp() for n in range(6) if labels[n] != labels[i])
        for j in range(6):
            if labels[j] == labels[i]:
                s = cosine(v[i], v[j], 0).exp()
                between.append(-(s / (s + others)).log())
    around = []
    for i in range(6):
        prototype = found.prototypes[labels[i]]
        others = sum(cosine(v[n], prototype, 0).exp() for n in range(6) if labels[n] != labels[i])
        s = cosine(v[i], prototype, 0).exp()
        around.append(-(s / (s + others)).log())
    close(found.loss(out, labels), torch.stack(between).mean() + torch.stack(around).mean())


def test_the_prototypes_loss_of_a_batch_of_one_class():
    """There is nothing to contrast with: the loss is zero and finite, and so are its gradients."""
    found, out = PrototypicalVerbalizer(model_of("bert"), ["a", "b"]), output(batch=3)
    loss = found.loss(out, torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.isfinite().all() for parameter in found.parameters())


def test_rules():
    """Han et al. 2021, section 3.3: log p(class) = sum_j log p_j(phi_j(class)), over the words that rules have in slot j."""
    rules = {"born": ("people", "was", "city"), "says": ("people", "say", "word"), "in": ("city", "is", "city")}
    found, out = RuleVerbalizer(TOKENIZER, rules), output(slots=3)
    slots = [("people", "city"), ("was", "say", "is"), ("city", "word")]
    log_p = [
        dict(zip(words, out.logits[:, j, [one_id(w) for w in words]].log_softmax(-1).T, strict=True))
        for j, words in enumerate(slots)
    ]
    expected = torch.stack([sum(log_p[j][word] for j, word in enumerate(rule)) for rule in rules.values()], 1)
    close(found.conjunctions(out), expected)
    close(found(out), expected.log_softmax(-1))
    # The scores do not change when labels come along.
    close(found.loss(out, torch.zeros(BATCH, dtype=torch.long)), -expected.log_softmax(-1)[:, 0].mean())


def test_rules_are_calibrated_slot_by_slot():
    rules = {"a": ("people", "was"), "b": ("city", "is")}
    found, free = RuleVerbalizer(TOKENIZER, rules), output(slots=2, batch=1)
    found.calibrate(*found.observed(free))
    torch.testing.assert_close(found(free).exp(), torch.full((1, 2), 0.5).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_words_without_a_space_ahead(scheme):
    """SentencePiece puts a space ahead of a text: in "电影好" the word is "好", and alone it would be "▁好"."""
    pieces = ["<unk>", "<pad>", "▁", "好", "▁好", "坏", "▁坏", "yes", "▁yes", "a", "▁a", "▁ay", "es", "1", "电", "影"]
    own = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", pad_token="<pad>")

    def tokens(prefix, *words):
        found = WordVerbalizer(tokenizer, {word: word for word in words}, prefix=prefix).label_words
        return [tokenizer.convert_ids_to_tokens(list(word.ids)) for word in found]

    assert tokens("", "好", "坏", "yes") == [["好"], ["坏"], ["yes"]]
    assert tokens(" ", "好", "坏", "yes") == [["▁好"], ["▁坏"], ["▁yes"]]
    assert tokenizer.tokenize("电影好")[-1] == "好"


def test_the_name_of_a_class_is_not_dropped_silently():
    """The word behind it would be taken for the name, with which `refine` compares all words."""
    words = {"good": ["good", "it was"], "bad": ["bad film", "bad", "awful"]}
    with pytest.raises(
        OptionError, match="'bad film', the name of the class 'bad', is no single token, so it would be left"
    ):
        KnowledgeableVerbalizer(TOKENIZER, words)
    assert KnowledgeableVerbalizer(TOKENIZER, {**words, "bad": ["bad", "bad film"]}).words_by_class()["bad"] == ["bad"]
    assert len(KnowledgeableVerbalizer(TOKENIZER, words, multi="mean").label_words) == 5


@pytest.mark.parametrize("kind", ["words", "knowledgeable", "soft", "prototypical", "rules"])
def test_autocast_does_not_round_the_scores_of_classes(kind):
    found = {
        "words": lambda: WordVerbalizer(TOKENIZER, WORDS),
        "knowledgeable": lambda: KnowledgeableVerbalizer(TOKENIZER, WORDS),
        "soft": lambda: SoftVerbalizer(model_of("bert"), ["good", "bad"]),
        "prototypical": lambda: PrototypicalVerbalizer(model_of("bert"), ["good", "bad"]),
        "rules": lambda: RuleVerbalizer(TOKENIZER, {"good": ("good",), "bad": ("bad",)}),
    }[kind]()
    out, labels = SlotOutput(*(part.float() for part in output()[:2])), torch.tensor([0, 1, 0, 1, 1])
    expected, loss = found(out), found.loss(out, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(found(out), expected)
        assert torch.equal(found.loss(out, labels), loss)


def test_half_precision_is_computed_in_float32():
    out = output()
    half = SlotOutput(out.logits.bfloat16(), out.hidden.bfloat16())
    assert WordVerbalizer(TOKENIZER, WORDS)(half).dtype == torch.float32
    assert PrototypicalVerbalizer(model_of("bert").bfloat16(), ["a", "b"])(half).dtype == torch.float32


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ({}, {}, "expected the names of the classes, at least one"),
        ({"good": []}, {}, "expected at least one word for the class 'good', found []"),
        ({"good": " "}, {}, "expected at least one word for the class 'good'"),
        ({"good": "zzz🎉"}, {}, "does not know the word 'zzz🎉' ('[UNK]')"),
        (
            {"good": "remember it"},
            {},
            "'remember it' is no single token: it is split: 'remember' 'it'; choose another word, or pass multi='mean', 'first' or 'score'",
        ),
        ({"good": ["it was", "was it"], "bad": "bad"}, {"multi": "drop"}, "all words of the class 'good' are split"),
        (
            {"good": "good", "bad": ["bad", "good"]},
            {},
            "the classes 'good' and 'bad' cannot be told apart: 'good' stands for both",
        ),
        ({"good": "Good", "bad": "good"}, {}, "'Good' and 'good' are the same ('good')"),
        (
            {"good": "good film", "bad": "good plot"},
            {"multi": "first"},
            "'good film' and 'good plot' have the same first token ('good'); choose another word, or pass multi='mean'",
        ),
        ({"good": "good"}, {"multi": "most"}, "multi"),
    ],
)
def test_words_that_cannot_work(words, options, message):
    with pytest.raises(OptionError) as error:
        WordVerbalizer(TOKENIZER, words, **options)
    assert message in str(error.value)


def test_a_word_that_is_there_twice_in_its_class_counts_once():
    assert WordVerbalizer(TOKENIZER, {"good": ["good", "good"], "bad": "bad"}).words_by_class() == {
        "good": ["good"],
        "bad": ["bad"],
    }


def test_split_words_are_dropped():
    found = WordVerbalizer(TOKENIZER, {"good": ["it was", "good"], "bad": "bad"}, multi="drop")
    assert found.words_by_class() == {"good": ["good"], "bad": ["bad"]}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "metaspace"])
def test_words_have_the_tokens_that_they_have_in_a_text(kind):
    tokenizer = tokenizer_of(kind)
    found = WordVerbalizer(tokenizer, {"yes": "yes", "no": "bad"}, multi="mean")
    for one in found.label_words:
        text = tokenizer(f"a {one.word}", add_special_tokens=False)["input_ids"]
        assert tuple(text[len(text) - len(one.ids) :]) == one.ids
        assert tokenizer.decode(list(one.ids)).strip() == one.word


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"a": ("people", "was"), "b": ("city",)}, "the rules have 1 and 2 words"),
        ({"a": ("people", "was"), "b": ("people", "was")}, "'a' and 'b' have the same words"),
        ({"a": ()}, "the rules have 0 words"),
        ({}, "expected the names of the classes"),
    ],
)
def test_rules_that_cannot_work(rules, message):
    with pytest.raises(OptionError, match=message):
        RuleVerbalizer(TOKENIZER, rules)


def test_other_options_that_cannot_work():
    model = model_of("bert")
    with pytest.raises(OptionError, match="words need a tokenizer"):
        SoftVerbalizer(model, WORDS)
    with pytest.raises(OptionError, match="the class 'a' is there twice"):
        PrototypicalVerbalizer(model, ["a", "a"])
    with pytest.raises(OptionError, match=r"size=0\): expected at least 1"):
        PrototypicalVerbalizer(model, ["a", "b"], size=0)
    with pytest.raises(TargetError, match="Linear: it has no language-model head"):
        SoftVerbalizer(nn.Linear(2, 3), ["a", "b"])
    with pytest.raises(OptionError, match="it has no words, so it cannot be calibrated"):
        SoftVerbalizer(model, ["a", "b"]).observed(output())
    with pytest.raises(OptionError, match="needs SlotOutput.word_scores; call it through a PromptModel"):
        WordVerbalizer(TOKENIZER, {"a": "it was", "b": "bad"}, multi="score")(output())


def test_what_is_printed():
    assert "good: good, great\n" in repr(WordVerbalizer(TOKENIZER, WORDS))


def test_a_verbalizer_of_ones_own():
    class Half(Verbalizer):
        def forward(self, output):
            return output.logits[:, 0, :2].log_softmax(-1)

        def to_dict(self):
            return {"kind": "half"}

    own = Half(["a", "b"])
    out = output()
    close(own.loss(out, torch.zeros(BATCH, dtype=torch.long)), -own(out)[:, 0].mean())
