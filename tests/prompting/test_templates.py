"""Templates: rendering, tokens, truncation, kinds of backbones, soft tokens, batches and what is printed."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.errors import OptionError, TargetError
from deltakit.prompting import Template
from support.prompt_models import MODELS, REVIEW, REVIEWS, TOKENIZER_OF, model_of, tokenizer_of

PAIR = '{"placeholder": "a"} Deduction: {"placeholder": "b"}. Is it correct? {"mask"}.'


def words(template, example):
    """The tokens that are left of an example."""
    return [token.text for token in template.explain(example).tokens if not token.cut]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("bert", "mlm"), ("roberta", "mlm"), ("gpt2", "causal"), ("t5", "seq2seq"), ("bart", "seq2seq")],
)
def test_the_kind_of_a_backbone(kind, expected):
    template = Template(REVIEW, tokenizer_of(TOKENIZER_OF[kind]), model_of(kind))
    assert template.kind == expected
    assert template.in_decoder == (kind == "t5")


def test_a_bert_that_is_a_decoder_is_causal():
    model = model_of("bert")
    model.config.is_decoder = True
    assert Template(REVIEW, tokenizer_of("wordpiece"), model).kind == "causal"


def test_the_kind_of_a_class_that_transformers_does_not_list():
    class Own(tf.BertForMaskedLM):
        pass

    own = Own(model_of("bert").config)
    assert Template(REVIEW, tokenizer_of("wordpiece"), own).kind == "mlm"
    with pytest.raises(TargetError, match="nothing shows whether it predicts masked or next words; pass Template"):
        Template(REVIEW, tokenizer_of("wordpiece"), nn.Linear(2, 3))
    assert Template(REVIEW, tokenizer_of("wordpiece"), nn.Linear(2, 3), kind="mlm").kind == "mlm"


def test_one_string_is_tokenized_once():
    template = Template(PAIR, tokenizer_of("bpe"), kind="mlm")
    example = {"a": "It was peeled down.", "b": "the language was peeled down"}
    assert (
        template.render(example) == "It was peeled down. Deduction: the language was peeled down. Is it correct?<mask>."
    )
    # Pieces that are tokenized one by one have a token of a space at their borders.
    alone = tokenizer_of("bpe")("It was peeled down. Deduction: the language was peeled down. Is it correct?")[
        "input_ids"
    ]
    assert template.encode(example).input_ids[: len(alone)] == alone


def test_the_mask_in_a_users_text_is_no_slot():
    template = Template(REVIEW, tokenizer_of("wordpiece"), kind="mlm")
    encoded = template.encode({"text": "a [MASK] film"})
    mask = tokenizer_of("wordpiece").mask_token_id
    places = [place for place, one in enumerate(encoded.input_ids) if one == mask]
    assert len(places) == 2
    assert encoded.slots == places[1:]


def test_spaces_ahead_of_a_slot_are_removed():
    template = Template('It was   {"mask"} .', tokenizer_of("bpe"), kind="mlm")
    assert words(template, {}) == [*tokenizer_of("bpe").tokenize("It was"), "<mask>", "Ġ", "."]


def test_a_causal_text_ends_at_its_slot():
    template = Template('{"placeholder": "text"} It was {"mask"}', tokenizer_of("metaspace"), kind="causal")
    encoded = template.encode({"text": "a film"})
    # The end mark that this tokenizer adds would stand between the text and the word.
    assert encoded.input_ids[-1] != tokenizer_of("metaspace").eos_token_id
    assert tokenizer_of("metaspace").decode(encoded.input_ids) == "a film It was"
    assert encoded.slots == [len(encoded.input_ids) - 1]


def test_an_empty_causal_text_has_the_start_token():
    template = Template('{"placeholder": "text"}{"mask"}', tokenizer_of("bpe"), kind="causal")
    assert template.encode({"text": ""}) == ([tokenizer_of("bpe").bos_token_id], [0], None, None)
    with pytest.raises(OptionError, match="nothing stands ahead of the slot"):
        own = copy.deepcopy(tokenizer_of("bpe"))
        own.bos_token = own.eos_token = None
        Template('{"placeholder": "text"}{"mask"}', own, kind="causal").encode({"text": ""})


def test_sentinels_of_several_slots():
    template = Template('{"mask"} is a {"mask"}', tokenizer_of("unigram"), model_of("t5"))
    encoded = template.encode({})
    first, second = (tokenizer_of("unigram").convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(2))
    assert encoded.decoder_input_ids == [0, first, second]
    assert encoded.slots == [1, 2]
    assert first in encoded.input_ids
    assert second in encoded.input_ids


@pytest.mark.parametrize(
    ("truncate", "left", "last"),
    [
        # Six field tokens are too many, and the two fields have eight and four.
        ("tail", 6, 0),
        ("head", 2, 4),
        ("balanced", 3, 3),
    ],
)
def test_truncation(truncate, left, last):
    # Each letter is a token of its own, as are the slot, the three of the template and the two special ones.
    template = Template(
        '{"placeholder": "a"} . {"placeholder": "b"} . {"mask"} .',
        tokenizer_of("wordpiece"),
        kind="mlm",
        max_length=12,
        truncate=truncate,
    )
    found = template.encode({"a": "w o w o w o w o", "b": "y o y o"})
    assert len(found.input_ids) == 12
    tokens = template.explain({"a": "w o w o w o w o", "b": "y o y o"}).tokens
    fields = [token for token in tokens if token.kind == "field"]
    kept = [token.cut is False for token in fields]
    assert sum(kept[:8]) == left
    assert sum(kept[8:]) == last
    # "head" keeps the end of a field, the others its start.
    own = kept[:8]
    assert own == sorted(own, reverse=truncate != "head")
    assert [token.text for token in tokens if token.kind == "slot"] == ["[MASK]"]
    assert not any(token.cut for token in tokens if token.kind in ("template", "slot", "special"))


@pytest.mark.parametrize("truncate", ["tail", "head", "balanced"])
@pytest.mark.parametrize("example", [{"a": "", "b": "y o y o y o"}, {"a": "y o y o y o", "b": ""}])
def test_truncation_with_an_empty_field(truncate, example):
    template = Template(PAIR, tokenizer_of("wordpiece"), kind="mlm", max_length=14, truncate=truncate)
    assert len(template.encode(example).input_ids) == 14
    assert len(template.encode(example).slots) == 1


def test_fields_that_are_not_shortenable_stay():
    text = '{"placeholder": "a"} {"meta": "entity"} {"mask"}'
    template = Template(text, tokenizer_of("wordpiece"), kind="mlm", max_length=8)
    example = {"a": "w o w o w o w", "meta": {"entity": "y y y"}}
    assert words(template, example) == ["[CLS]", "w", "o", "y", "y", "y", "[MASK]", "[SEP]"]
    assert template.encode({"a": "w o w o", "entity": "y y y"}) == template.encode(example)
    with pytest.raises(OptionError, match="9 tokens of this example may not be truncated, and max_length is 8"):
        template.encode({"a": "w", "entity": "y y y y y y"})


def test_the_space_ahead_of_a_field_does_not_keep_its_first_token():
    start = tokenizer_of("bpe").tokenize("Text:")
    template = Template(
        'Text: {"placeholder": "a"} {"mask"}', tokenizer_of("bpe"), kind="mlm", max_length=len(start) + 1
    )
    assert words(template, {"a": "good good good"}) == [*start, "<mask>"]


def test_a_token_across_a_border_stays():
    """A token that holds text of the template and of a field is no token of the field."""
    tokenizer = tokenizer_of("bpe")
    assert tokenizer.tokenize("a film") == ["a", "Ġfilm"]
    template = Template('a fi{"placeholder": "a"} {"mask"}', tokenizer, kind="mlm", max_length=5)
    assert words(template, {"a": "lm good good good"}) == ["a", "Ġfilm", "Ġgood", "Ġgood", "<mask>"]
    template = Template('a fi{"placeholder": "a"} {"mask"}', tokenizer, kind="mlm", max_length=4, truncate="head")
    assert words(template, {"a": "lm good good good"}) == ["a", "Ġfilm", "Ġgood", "<mask>"]


def test_the_longest_example_comes_from_the_backbone():
    assert Template(REVIEW, tokenizer_of("wordpiece"), model_of("bert")).max_length == 71
    # RoBERTa's positions start behind its padding_idx 1; BART's table has two rows more.
    assert Template(REVIEW, tokenizer_of("bpe"), model_of("roberta")).max_length == 69
    assert Template(REVIEW, tokenizer_of("bpe"), model_of("bart")).max_length == 71
    assert Template(REVIEW, tokenizer_of("unigram"), model_of("t5")).max_length is None
    model, template = model_of("roberta"), Template(REVIEW, tokenizer_of("bpe"), model_of("roberta"))
    batch = template.collate([{"text": "a " * 100}])
    assert batch["input_ids"].shape == (1, 69)
    batch.pop("slots")
    assert model(**batch).logits.shape[1] == 69


def test_filters():
    template = Template(
        '{"placeholder": "text", "filter": "lower"} {"mask"}',
        tokenizer_of("bpe"),
        kind="mlm",
        filters={"lower": str.lower},
    )
    assert template.render({"text": "A Film"}) == "a film<mask>"
    with pytest.raises(OptionError, match="column 1: no filter 'lower' was given, only 'lowr'; did you mean lowr"):
        Template(
            '{"placeholder": "text", "filter": "lower"} {"mask"}',
            tokenizer_of("bpe"),
            kind="mlm",
            filters={"lowr": str.lower},
        )
    broken = Template(
        '{"placeholder": "text", "filter": "n"} {"mask"}', tokenizer_of("bpe"), kind="mlm", filters={"n": len}
    )
    with pytest.raises(OptionError, match="expected a text after the filter 'n', found int"):
        broken.encode({"text": "a"})


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ('{"placeholder": "text"}', "mlm", "it has no slot, so nothing is predicted"),
        ('{"mask"} and {"mask"}', "causal", "predicts one slot, at the end, and this template has 2"),
        (
            'It was {"mask"}, {"placeholder": "text"}',
            "causal",
            "text behind its slot \\(column 8\\); move the slot to the end",
        ),
        ('It was {"mask"}.', "causal", "has text behind its slot"),
        ('{"soft"} {"mask"}', "mlm", "pass the backbone as the third argument"),
        ('{"mask"}' * 5, "seq2seq", "a sentinel <extra_id_3>, and TokenizersBackend has none"),
        ("word " * 100 + '{"mask"}', "seq2seq", "tokens without any field, and max_length is 20"),
    ],
)
def test_templates_that_cannot_work(text, kind, message):
    with pytest.raises(OptionError, match=message):
        Template(text, tokenizer_of("unigram" if kind == "seq2seq" else "bpe"), kind=kind, max_length=20)


def test_tokenizers_that_cannot_work():
    class Slow:
        is_fast = False

    with pytest.raises(OptionError, match="the tokenizer Slow gives no offsets"):
        Template(REVIEW, Slow(), kind="mlm")
    with pytest.raises(OptionError, match="needs a mask token, and TokenizersBackend has none"):
        Template(REVIEW, tokenizer_of("unigram"), kind="mlm")
    with pytest.raises(OptionError, match="without a backbone nothing says what it predicts"):
        Template(REVIEW, tokenizer_of("bpe"))
    with pytest.raises(OptionError, match="max_length=0"):
        Template(REVIEW, tokenizer_of("bpe"), kind="mlm", max_length=0)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"txt": "a"}, "the field 'text' \\(column 1\\): the example has no such field, only txt; did you mean txt"),
        ({"label": 1}, "with the Trainer pass remove_unused_columns=False"),
        ({"text": None}, "expected a text, found NoneType"),
        ({"text": ["a"]}, "expected a text, found list"),
        ({"text": "a\ud800"}, "half of a surrogate pair at 1"),
    ],
)
def test_examples_that_do_not_fit(example, message):
    with pytest.raises(OptionError, match=message):
        Template(REVIEW, tokenizer_of("bpe"), kind="mlm").encode(example)


def test_labels_of_a_batch():
    template = Template(REVIEW, tokenizer_of("bpe"), kind="mlm")
    assert "labels" not in template.collate([{"text": "a"}])
    given = [{"text": "a", "label": 2}, {"text": "b", "label": torch.tensor(0)}]
    assert template.collate(given)["labels"].tolist() == [2, 0]
    assert template.collate(REVIEWS, classes=["bad", "good"])["labels"].tolist() == [1, 0, 1]
    with pytest.raises(
        OptionError, match="expected as a label an index, found 'good'; PromptModel.collate also takes the names"
    ):
        template.collate(REVIEWS)
    with pytest.raises(OptionError, match="expected as a label one of 'bad', or an index below 1, found 1"):
        template.collate([{"text": "a", "label": 1}], classes=["bad"])
    assert template.collate([{"text": "a", "label": np.int64(1)}])["labels"].tolist() == [1]
    for several in (torch.tensor([0, 1]), np.array([0, 1]), [0, 1], 1.0, np.array([1.0])):
        with pytest.raises(OptionError, match="expected as a label an index, found"):
            template.collate([{"text": "a", "label": several}])
    with pytest.raises(OptionError, match="1 of 2 examples have no label"):
        template.collate([{"text": "a", "label": 1}, {"text": "a"}])
    with pytest.raises(OptionError, match="at least one example, found none"):
        template.collate([])


def test_soft_tokens():
    text = '{"soft": "it was"} {"placeholder": "text"} {"soft"} {"soft": None, "duplicate": 3} {"mask"}'
    model, tokenizer = model_of("bert"), tokenizer_of("wordpiece")
    template = Template(text, tokenizer, model)
    vocabulary = model.config.vocab_size
    assert template.num_soft == 6
    ids = template.encode({"text": "good"}).input_ids
    assert [one - vocabulary for one in ids if one >= vocabulary] == [0, 1, 2, 3, 4, 5]
    method = template.soft_prompt()
    assert method == dk.SoftPrompt(tokens=6, prepend=False, init_ids=method.init_ids)
    assert list(method.init_ids[:2]) == tokenizer("it was", add_special_tokens=False)["input_ids"]
    delta = dk.attach(model, method)
    start = model.get_input_embeddings().weight[list(method.init_ids)]
    assert torch.equal(next(iter(delta.parameters())), start)
    assert template.soft_prompt(dk.PTuning).tokens == 6
    with pytest.raises(OptionError, match="the template says this option"):
        template.soft_prompt(tokens=3)
    with pytest.raises(OptionError, match="the template has no soft tokens"):
        Template(REVIEW, tokenizer, model).soft_prompt()


def test_soft_tokens_that_are_shared():
    def numbers(text):
        ids = Template(text + ' {"mask"}', tokenizer_of("wordpiece"), model_of("bert")).encode({}).input_ids
        first = model_of("bert").config.vocab_size
        return [one - first for one in ids if one >= first]

    assert numbers('{"soft": None, "duplicate": 3, "same": True} {"soft"}') == [0, 0, 0, 1]
    assert numbers('{"soft": "it was", "soft_id": 1} {"soft"} {"soft_id": 1}') == [0, 1, 2, 0, 1]
    assert numbers('{"soft_id": 1} {"soft": "it was", "soft_id": 1}') == [0, 1, 0, 1]
    assert numbers('{"soft": None, "duplicate": 2, "soft_id": "q"}{"soft_id": "q"}') == [0, 1, 0, 1]
    with pytest.raises(OptionError, match="soft_id 1 has different words, 'it' and 'was'"):
        numbers('{"soft": "it", "soft_id": 1} {"soft": "was", "soft_id": 1}')
    with pytest.raises(OptionError, match="soft_id 1 has 2 and 5 tokens; write them once"):
        numbers('{"soft": None, "duplicate": 2, "soft_id": 1} {"soft": None, "duplicate": 5, "soft_id": 1}')
    with pytest.raises(OptionError, match="soft_id 1 has 2 tokens and the words 'it'"):
        numbers('{"soft": None, "duplicate": 2, "soft_id": 1} {"soft": "it", "soft_id": 1}')


@pytest.mark.parametrize("kind", MODELS)
def test_soft_tokens_are_the_rows_of_the_delta(kind):
    """A soft token that starts as a word and was not trained is this word."""
    tokenizer, model = tokenizer_of(TOKENIZER_OF[kind]), model_of(kind)
    template = Template('{"placeholder": "text"} {"soft": "it"} {"mask"}', tokenizer, model)
    method = template.soft_prompt()
    batch = template.collate([{"text": "a film"}])
    batch.pop("slots")
    soft = batch["input_ids"] >= model.config.vocab_size
    plain = batch["input_ids"].clone()
    plain[soft] = torch.tensor(method.init_ids)
    with torch.no_grad():
        expected = model(**{**batch, "input_ids": plain}).logits
        dk.attach(model, method)
        found = model(**batch).logits
    assert torch.equal(found, expected)


def test_what_is_printed(capsys):
    template = Template(
        '{"placeholder": "text"} {"soft"} It was {"mask"}', tokenizer_of("wordpiece"), model_of("bert"), max_length=8
    )
    found = template.explain({"text": "w o w o"})
    print(found)
    assert capsys.readouterr().out.splitlines() == [
        "[CLS] w o ~w~ ~o~ <soft 0> it was «[MASK]» [SEP]",
        "template · field · slot «» · soft <> · special · ~deleted~",
        "8 tokens, max_length 8, 2 deleted (tail)",
    ]
    html = found._repr_html_()
    assert html.count("line-through") == 2
    assert "[MASK]" in html
    assert "<script" not in template.explain({"text": "<script>"})._repr_html_()


def test_what_is_printed_in_a_terminal(monkeypatch):
    template = Template(REVIEW, tokenizer_of("wordpiece"), kind="mlm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[35m«[MASK]»\x1b[0m" in str(template.explain({"text": "a"}))
    # A text of somebody else does not reach the terminal as it is.
    own = Template(REVIEW, tokenizer_of("bpe"), kind="mlm")
    assert "\x1b[2J" not in str(own.explain({"text": "\x1b[2J"}))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in str(template.explain({"text": "a"}))


def test_copies():
    template = Template(REVIEW, tokenizer_of("bpe"), kind="mlm")
    assert pickle.loads(pickle.dumps(template)).encode({"text": "a"}) == template.encode({"text": "a"})
    assert copy.deepcopy(template).encode({"text": "a"}) == template.encode({"text": "a"})
