"""`{"soft": "words"}` starts as the tokens that the words have as text in the same place."""

import pytest
import torch

import deltakit as dk
from deltakit.errors import OptionError
from deltakit.prompting import Template, parse_template, soft_tokens
from support.prompt_models import TOKENIZER_OF, TOKENIZERS, model_of, tokenizer_of

KIND_OF = {"wordpiece": "mlm", "bpe": "mlm", "unigram": "seq2seq", "metaspace": "seq2seq"}
SAME = [
    "it was| {text} {mask}",
    "| it was| {text} {mask}",
    "{text} |it was| {mask}",
    "{text} | it was | {mask}",
    "{text} is: |so| {mask}",
    "{text}. |It was| fine, {mask}",
    '"|so| " {text} {mask}',
    "{text} |it| |was| {mask}",
    "{mask} |it was| {text}",
    "{text} |New York| {mask} |😀 it|",
]
"""Templates whose words between bars are soft."""


def hard(text):
    return text.replace("|", "").replace("{text}", '{"placeholder": "text"}').replace("{mask}", '{"mask"}')


def soft(text):
    parts = text.split("|") if text.count("|") % 2 == 0 else ["", *text.split("|")]
    made = [f'{{"soft": "{part}"}}' if number % 2 else part for number, part in enumerate(parts)]
    return hard("".join(made))


def starts(text, kind):
    return soft_tokens(parse_template(text), tokenizer_of(kind)).starts


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", SAME)
def test_they_are_the_tokens_of_the_same_text(text, kind):
    tokenizer, model = tokenizer_of(kind), model_of("bert", tokenizer_of(kind))
    template = Template(soft(text), tokenizer, model, kind=KIND_OF[kind])
    plain = Template(hard(text).replace("  ", " "), tokenizer, model, kind=KIND_OF[kind])
    own = template.soft_prompt().init_ids
    first = template.first_soft
    for example in ({"text": "a film to remember"}, {"text": "good (!)"}):
        ids = template.encode(example).input_ids
        assert [own[one - first] if one >= first else one for one in ids] == plain.encode(example).input_ids


def test_the_tokens_of_byte_level_bpe():
    tokenizer = tokenizer_of("bpe")

    def shown(text):
        return tokenizer.convert_ids_to_tokens(starts(text, "bpe"))

    assert shown('{"soft": "it was"} {"mask"}') == ["it", "Ġwas"]
    assert shown('{"placeholder": "a"} {"soft": "it was"} {"mask"}') == ["Ġit", "Ġwas"]
    assert shown('{"placeholder": "a"}{"soft": "it was"} {"mask"}') == ["it", "Ġwas"]
    assert shown('{"placeholder": "a"}{"soft": " it was "}{"mask"}') == ["Ġit", "Ġwas"]
    # Where a token would hold text of both sides, the words stand alone.
    assert shown('a fi{"soft": "ne"} {"mask"}') == shown('{"soft": "ne"} {"mask"}')
    # Pieces with one soft_id have the tokens of the place with the words.
    assert shown('{"mask"} {"soft_id": 1} {"soft": "so", "soft_id": 1}') == ["Ġso"]


def test_words_inside_a_word():
    def shown(text, kind):
        return tokenizer_of(kind).convert_ids_to_tokens(starts(text, kind))

    assert shown('a{"soft": "zz"} {"mask"}', "wordpiece")[0] in ("##z", "[UNK]")
    assert shown('{"placeholder": "a"}{"soft": "it"} {"mask"}', "metaspace") == ["it"]
    assert shown('{"placeholder": "a"} {"soft": "it"} {"mask"}', "metaspace") == ["▁it"]


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "t5", "bart"])
def test_an_untrained_soft_template_predicts_as_its_words(kind):
    tokenizer, model = tokenizer_of(TOKENIZER_OF[kind]), model_of(kind)
    text = "{text} |it was| {mask}"
    plain, template = (Template(make(text), tokenizer, model) for make in (hard, soft))
    example = {"text": "a film to remember"}

    def logits(own):
        batch = own.collate([example])
        batch.pop("slots")
        with torch.no_grad():
            return model(**batch).logits

    expected = logits(plain)
    dk.attach(model, template.soft_prompt())
    assert torch.equal(logits(template), expected)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(OptionError, match="the tokenizer Slow gives no offsets"):
        soft_tokens(parse_template('{"soft": "it"} {"mask"}'), Slow())
