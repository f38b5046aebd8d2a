"""OpenPrompt's templates and tokenizer wrappers."""

import pytest
import torch

from deltakit.errors import DeltaWarning, OptionError
from deltakit.openprompt.data_utils import InputExample
from deltakit.openprompt.plms import LMTokenizerWrapper, MLMTokenizerWrapper, T5LMTokenizerWrapper, T5TokenizerWrapper
from deltakit.openprompt.prompts import ManualTemplate, MixedTemplate, SoftTemplate
from support.prompt_models import model_of, tokenizer_of
from support.seed_tokenizer import t5_tokenizer

EXAMPLE = InputExample(guid=5, text_a="a film", text_b="good (!)", label=1, meta={"city": "New York"}, tgt_text="yes")


def pieces(text, example=EXAMPLE, **options):
    return ManualTemplate(tokenizer_of("bpe"), text, **options).wrap_one_example(example)[0]


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ('{"placeholder":"text_a"} It was {"mask"}.', ["a film", " It was", "<mask>", "."]),
        ('{"placeholder":"text_a"}   {"placeholder":"text_b"} {"mask"}', ["a film", " good (!)", "<mask>"]),
        ('x {"meta": "city"}, a {"mask"} {"special": "<eos>"}', ["x", " New York", ", a", "<mask>", "<eos>"]),
        ("{'text': 'so'}{'mask'} {{b}}", ["so", "<mask>", " {b}"]),
        ('{"placeholder": "text_b", "post_processing": "short"}{"mask"}', ["good", "<mask>"]),
    ],
)
def test_the_texts_of_pieces(text, texts):
    assert [piece["text"] for piece in pieces(text, filters={"short": lambda value: value[:4]})] == texts


def test_flags_and_what_follows_the_pieces():
    template = ManualTemplate(tokenizer_of("bpe"))
    template.text = '{"placeholder": "text_a", "shortenable": False} {"meta": "city", "shortenable": True} {"mask"}'
    found, others = template.wrap_one_example(EXAMPLE)
    assert [(piece["loss_ids"], piece["shortenable_ids"]) for piece in found] == [(0, 0), (0, 1), (1, 0)]
    assert others == {"guid": 5, "label": 1, "tgt_text": "yes"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("It was.", "ManualTemplate: 'It was.' has no slot; write {\"mask\"} where the answer stands"),
        ('{"soft"} {"mask"}', "column 1: it has no soft tokens; use a MixedTemplate(model, tokenizer, text)"),
        ('{"placeholder": "text_a", "post_processing": lambda x: x} {"mask"}', "templates are not executed"),
        (
            '{"placeholder": "text_a", "filter": "f"} {"mask"}',
            "no function 'f' was given; pass filters={'f': function}",
        ),
        ('{"placeholder": "text_c"} {"mask"}', "the field 'text_c' (column 1): the example has no such field"),
        (None, "ManualTemplate: it has no text yet; pass text=, or call from_file"),
    ],
)
def test_errors_of_templates(text, message):
    with pytest.raises(OptionError) as error:
        pieces(text)
    assert message in str(error.value)


@pytest.mark.usefixtures("unchecked")
def test_an_example_of_another_type_is_refused():
    with pytest.raises(OptionError, match="expected an InputExample, found a dictionary"):
        pieces('{"mask"}', example={"text_a": "x"})


def test_from_file(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text('{"mask"} one\n{"mask"} two\n', encoding="utf-8")
    assert ManualTemplate(tokenizer_of("bpe")).from_file(str(path), choice=1).text == '{"mask"} two'
    with pytest.raises(OptionError, match="choice=2\\): the file has 2 lines, counted from 0"):
        ManualTemplate(tokenizer_of("bpe")).from_file(str(path), choice=2)


def tokens(wrapper, tokenizer, text, example=EXAMPLE):
    found = wrapper.tokenize_one_example(ManualTemplate(tokenizer, text).wrap_one_example(example))
    kept = sum(found["attention_mask"])
    assert len(found["input_ids"]) == len(found["attention_mask"]) == wrapper.max_seq_length
    return tokenizer.convert_ids_to_tokens(found["input_ids"][:kept]), found


def test_a_masked_model_gets_the_mask_token_and_the_ids_of_the_text():
    tokenizer = tokenizer_of("wordpiece")
    wrapper = MLMTokenizerWrapper(max_seq_length=17, tokenizer=tokenizer, create_token_type_ids=True)
    shown, found = tokens(wrapper, tokenizer, '{"placeholder": "text_a"} It was {"mask"} {"special": "<sep>"} a')
    assert shown == tokenizer.tokenize("a film It was [MASK] [SEP] a", add_special_tokens=True)
    assert found["loss_ids"].index(1) == shown.index("[MASK]")
    assert sum(found["loss_ids"]) == 1
    assert found["token_type_ids"] == [0] * 17


def test_a_causal_model_predicts_behind_the_text():
    tokenizer = tokenizer_of("bpe")
    wrapper = LMTokenizerWrapper(max_seq_length=23, tokenizer=tokenizer)
    shown, found = tokens(wrapper, tokenizer, '{"placeholder": "text_a"} It was {"mask"}.')
    assert tokenizer.convert_tokens_to_string(shown) == "a film It was"
    assert found["loss_ids"].index(1) == len(shown) - 1 == found["input_ids_len"] - 1
    with pytest.warns(DeltaWarning, match="' good \\(!\\)' stands behind the slot and has no effect"):
        tokens(wrapper, tokenizer, '{"placeholder": "text_a"} {"mask"} {"placeholder": "text_b"}')


def test_an_adapted_t5_reads_up_to_the_slot():
    tokenizer = t5_tokenizer()
    wrapper = T5LMTokenizerWrapper(max_seq_length=7, tokenizer=tokenizer, decoder_max_length=3)
    example = InputExample(text_a="it was a complex language", label=0)
    shown, found = tokens(wrapper, tokenizer, '{"placeholder": "text_a"} correct? {"mask"}.', example)
    assert shown == ["▁it", "▁was", "▁", "a", "▁correct", "?", "</s>"]
    assert tokenizer.convert_ids_to_tokens(found["decoder_input_ids"]) == ["<pad>", "<extra_id_0>", "</s>"]
    assert found["loss_ids"] == [0, 1, 0]
    assert wrapper.truncate_rate == 1.0


@pytest.mark.parametrize(
    ("truncate", "kept"),
    [
        ("tail", ["▁it", "▁was", "▁complex"]),
        ("head", ["▁language", "▁handed", "▁down"]),
        ("balanced", ["▁it", "▁was", "▁handed"]),
    ],
)
def test_truncation(truncate, kept):
    tokenizer = t5_tokenizer()
    wrapper = T5TokenizerWrapper(max_seq_length=7, tokenizer=tokenizer, truncate_method=truncate)
    assert wrapper.truncate_rate is None
    example = InputExample(text_a="it was complex language", text_b="handed down")
    text = '{"placeholder": "text_a"} {"placeholder": "text_b"} correct? {"mask"}'
    assert tokens(wrapper, tokenizer, text, example)[0] == [*kept, "▁correct", "?", "<extra_id_0>", "</s>"]
    tokens(wrapper, tokenizer, text, InputExample(text_a="it", text_b="was down"))
    assert wrapper.truncate_rate == 0.5


def test_several_slots_of_t5_get_sentinels_in_their_order():
    tokenizer = t5_tokenizer()
    wrapper = T5TokenizerWrapper(max_seq_length=11, tokenizer=tokenizer, decoder_max_length=5)
    shown, found = tokens(wrapper, tokenizer, '{"mask"} was {"mask"}')
    assert shown == ["<extra_id_0>", "▁was", "<extra_id_1>", "</s>"]
    assert found["decoder_input_ids"] == [0, 32099, 32098, 0, 0]
    assert found["loss_ids"] == [0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate_method": "middle"}, "expected 'tail', 'head' or 'balanced'"),
        ({"predict_eos_token": True}, "are not served, because they serve generation"),
        ({"decode_from_pad": False}, "are not served, because they serve generation"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_of_wrappers(options, message):
    with pytest.raises(OptionError, match=message):
        T5TokenizerWrapper(max_seq_length=5, tokenizer=t5_tokenizer(), **options)


def test_errors_of_wrappers():
    tokenizer = t5_tokenizer()
    wrapped = ManualTemplate(tokenizer, '{"special": "<sep>"} {"mask"}').wrap_one_example(EXAMPLE)
    wrapper = LMTokenizerWrapper(max_seq_length=9, tokenizer=tokenizer)
    with pytest.raises(OptionError, match="teacher_forcing=True is not served"):
        wrapper.tokenize_one_example(wrapped, teacher_forcing=True)
    with pytest.raises(OptionError, match="the tokenizer has no token for <sep>; leave it out of the template"):
        wrapper.tokenize_one_example(wrapped)
    with pytest.raises(OptionError, match="the example has no slot"):
        wrapper.tokenize_one_example([wrapped[0][:1], {}])


def test_soft_tokens_have_openprompts_numbers_and_start_as_words():
    tokenizer, model = tokenizer_of("wordpiece"), model_of("bert")
    text = '{"soft": None} {"soft": "the", "soft_id": 1} {"soft": None} {"soft": "it", "soft_id": 3} {"soft_id": 1} {"soft": "was"} '
    template = MixedTemplate(
        model, tokenizer, text + '{"placeholder": "text_a"} {"soft": None, "duplicate": 2} {"mask"}'
    )
    wrapped = template.wrap_one_example(EXAMPLE)
    assert [piece["soft_token_ids"] for piece in wrapped[0]] == [1, 2, 3, 4, 2, 5, 0, 6, 7, 0]
    assert [piece["text"] for piece in wrapped[0]] == ["", "the", "", "it", "the", "was", " a film", "", "", "<mask>"]
    assert list(wrapped[0][0]) == ["text", "soft_token_ids", "loss_ids", "shortenable_ids"]
    words = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(["the", "it", "was"])]
    assert torch.equal(template.soft_embedding.weight[[2, 4, 5]], words)
    found = MLMTokenizerWrapper(max_seq_length=19, tokenizer=tokenizer).tokenize_one_example(wrapped)
    film = len(tokenizer.tokenize("a film"))
    assert found["soft_token_ids"] == [0, 1, 2, 3, 4, 2, 5, *[0] * film, 6, 7, *[0] * (10 - film)]
    assert [one for one, soft in zip(found["input_ids"], found["soft_token_ids"], strict=True) if soft] == [0] * 8


@pytest.mark.parametrize("start", ["vocabulary", "random", "given"])
def test_a_soft_template_starts_as_openprompts(start):
    model = model_of("gpt2")
    options = {
        "vocabulary": {"num_tokens": 3},
        "random": {"num_tokens": 3, "initialize_from_vocab": False, "random_range": 0.25},
        "given": {"soft_embeds": torch.full((3, 28), 0.5)},
    }[start]
    template = SoftTemplate(model, tokenizer_of("bpe"), '{"mask"}', **options)
    assert template.num_tokens == 3
    assert dict(template.named_parameters()).keys() == {"soft_embeds"}
    words = model.get_input_embeddings().weight[:3]
    if start == "random":
        assert 0.2 < template.soft_embeds.abs().max() <= 0.25
    else:
        assert torch.equal(template.soft_embeds, words if start == "vocabulary" else torch.full((3, 28), 0.5))
    assert model.get_input_embeddings().weight.requires_grad
