"""Templates with texts of any kind: the mask token, braces, nothing, right-to-left text, emoji."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakit.prompting import Template
from support.prompt_models import TOKENIZERS, model_of, tokenizer_of

MODEL_OF = {"wordpiece": "bert", "bpe": "roberta", "unigram": "t5", "metaspace": "t5"}
PARTS = [
    "[MASK]",
    "<mask>",
    "<extra_id_0>",
    "</s>",
    "{",
    "}",
    '{"mask"}',
    "שלום",
    "مرحبا",
    "🎉",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "\u200f",
    " ",
    "  ",
    "\n",
    "good",
    "a",
    ".",
    "▁",
    "Ġ",
    "\x00",
    "字",
]
texts = st.one_of(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.text(max_size=12))


def template_of(kind, **options):
    tokenizer, model = tokenizer_of(kind), model_of(MODEL_OF[kind], tokenizer_of(kind))
    # Texts are tokenized here, and go into no model: its table of positions is no limit.
    model.config.max_position_embeddings = 20_000
    text = '{"placeholder": "a"} is {"soft"} {"placeholder": "b", "shortenable": False}: {"mask"}, yes {{}}.'
    return Template(text, tokenizer, model, **options), model.config.vocab_size


@settings(max_examples=60)
@given(a=texts, b=texts)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_text_has_one_slot_and_one_soft_token(kind, a, b):
    template, vocabulary = template_of(kind, max_length=10_000)
    encoded = template.encode({"a": a, "b": b})
    tokens = template.explain({"a": a, "b": b}).tokens
    assert [token.kind for token in tokens].count("slot") == 1
    assert [one for one in encoded.input_ids if one >= vocabulary] == [vocabulary]
    assert len(encoded.input_ids) == len(tokens)
    place = [token.kind for token in tokens].index("slot")
    marker = template.marker_ids[0]
    assert encoded.input_ids[place] == marker
    assert encoded.slots == ([1] if template.in_decoder else [place])
    # The slot is the one of the template, and not one in a user's text.
    assert [token.kind for token in tokens][place:].count("field") == 0


@settings(max_examples=60)
@given(a=texts, b=texts, spare=st.integers(0, 6), truncate=st.sampled_from(["tail", "head", "balanced"]))
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_truncation_keeps_all_but_the_field(kind, a, b, spare, truncate):
    full, _ = template_of(kind, max_length=10_000)
    tokens = full.explain({"a": a, "b": b}).tokens
    fixed = len(full.encode({"a": "", "b": b}).input_ids)
    limit = max(fixed + spare, len(full.encode({"a": "", "b": ""}).input_ids))
    template, _ = template_of(kind, max_length=limit, truncate=truncate)
    own = template.explain({"a": a, "b": b})
    left = [token for token in own.tokens if not token.cut]
    assert len(left) == len(template.encode({"a": a, "b": b}).input_ids) <= max(limit, 0)
    assert len(left) == min(len(tokens), limit)
    others = [token.text for token in tokens if token.kind != "field"]
    assert [token.text for token in left if token.kind != "field"] == others
    assert all(token.kind == "field" for token in own.tokens if token.cut)


@settings(max_examples=40)
@given(examples=st.lists(st.fixed_dictionaries({"a": texts, "b": texts}), min_size=1, max_size=4))
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_batch_has_the_examples_one_by_one(kind, examples):
    template, _ = template_of(kind, max_length=10_000)
    batch = template.collate(examples)
    for row, example in enumerate(examples):
        alone = template.encode(example)
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == alone.input_ids
        assert batch["slots"][row].tolist() == alone.slots
        assert not kept.long().diff().gt(0).any()


@settings(max_examples=60)
@given(a=texts)
@pytest.mark.parametrize("kind", ["bpe", "metaspace"])
def test_the_tokens_are_those_of_the_text(kind, a):
    """Rendering adds nothing of its own: what is ahead of the slot has the tokens of the text alone."""
    template = Template('Text: {"placeholder": "a"}. So {"mask"}', tokenizer_of(kind), kind="causal", max_length=10_000)
    found = template.encode({"a": a}).input_ids
    alone = tokenizer_of(kind)(f"Text: {a}. So")["input_ids"]
    assert alone[: len(found)] == found
    assert len(alone) - len(found) == (kind == "metaspace")
