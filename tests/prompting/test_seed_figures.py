"""The figures that the seed prints for OpenPrompt's pipeline on T5, without a hub: its tokenizer is rebuilt from the printed ids.

The seed's tokens have two lone "▁". The first, ahead of the dot behind "down", is there because OpenPrompt tokenizes pieces one
by one. The second, behind the sentinel, is T5's own: its tokenizer starts anew behind a special token.
"""

import pytest
import torch
import transformers as tf

from deltakit.prompting import PromptModel, SlotOutput, Template, WordVerbalizer

TEMPLATE = '{"placeholder":"text_a"} Deduction: {"placeholder":"text_b"}. Is it correct? {"mask"}.'
EXAMPLE = {
    "text_a": "It was a complex language. Not written down but handed down. One might say it was peeled down.",
    "text_b": "the language was peeled down",
    "label": 0,
}
WRAPPED = [EXAMPLE["text_a"], " Deduction:", " the language was peeled down", ". Is it correct?", "<mask>", "."]
# fmt: off
IDS = [94, 47, 3, 9, 1561, 1612, 5, 933, 1545, 323, 68, 14014, 323, 5, 555, 429, 497, 34, 47, 158, 400, 26, 323, 5, 374, 8291, 10, 8, 1612, 47, 158, 400, 26, 323, 3, 5, 27, 7, 34, 2024, 58, 32099, 3, 5, 1]
PIECES = ["▁It", "▁was", "▁", "a", "▁complex", "▁language", ".", "▁Not", "▁written", "▁down", "▁but", "▁handed", "▁down", ".", "▁One", "▁might", "▁say", "▁it", "▁was", "▁pe", "ele", "d", "▁down", ".", "▁De", "duction", ":", "▁the", "▁language", "▁was", "▁pe", "ele", "d", "▁down", "▁", ".", "▁I", "s", "▁it", "▁correct", "?", "<extra_id_0>", "▁", ".", "</s>"]
# fmt: on
STRAY = 34
"""The place of the token that only piecewise tokenization has."""
DECODER_IDS = [0, 32099, 0]
LABEL_WORDS = {"▁yes": 4273, "▁no": 150, "▁maybe": 2087}
SCORES = [[-2.6867, -0.1306, -2.9124], [-0.6579, -0.8735, -2.7400]]
"""What its verbalizer prints for random logits."""


@pytest.fixture(scope="module")
def tokenizer():
    known = {one: piece for one, piece in zip(IDS, PIECES, strict=True) if piece[0] != "<"}
    known |= {one: piece for piece, one in LABEL_WORDS.items()} | {0: "<pad>", 1: "</s>", 2: "<unk>"}
    # All other pieces are characters of private use. Fewer pieces have the higher score.
    known |= {32_099 - number: f"<extra_id_{number}>" for number in range(100)}
    vocabulary = [(known.get(one, chr(0xF0000 + one)), -1.0) for one in range(32_100)]
    return tf.T5Tokenizer(vocab=vocabulary, extra_ids=100)


def test_the_tokens(tokenizer):
    template = Template(TEMPLATE, tokenizer, kind="seq2seq")
    assert template.render(EXAMPLE) == "".join(WRAPPED).replace("<mask>", "<extra_id_0>")
    encoded = template.encode(EXAMPLE)
    assert encoded.input_ids == IDS[:STRAY] + IDS[STRAY + 1 :]
    assert [token.text for token in template.explain(EXAMPLE).tokens] == PIECES[:STRAY] + PIECES[STRAY + 1 :]
    # The seed's decoder has one more position, behind the word that is predicted.
    assert encoded.decoder_input_ids == DECODER_IDS[:2]
    assert encoded.slots == [1]


def test_the_label_words(tokenizer):
    found = WordVerbalizer(tokenizer, {"entailment": "yes", "contradiction": "no", "neutral": "maybe"})
    assert [list(word.ids) for word in found.label_words] == [[one] for one in LABEL_WORDS.values()]


def test_the_scores(tokenizer):
    """The printed rows are log-probabilities among the label words: as logits of these words, they give themselves."""
    found = WordVerbalizer(tokenizer, {"entailment": "yes", "contradiction": "no", "neutral": "maybe"})
    scores = torch.tensor(SCORES, dtype=torch.float64)
    logits = torch.randn(2, 1, 32_100).double() * 3
    logits[:, 0, list(LABEL_WORDS.values())] = scores + 5
    torch.testing.assert_close(found(SlotOutput(logits, torch.zeros(2, 1, 3))), scores, rtol=0, atol=1e-4)


def test_the_pipeline(tokenizer):
    """The seed's sizes but for the model's: a T5 from a config, its vocabulary, its example."""
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=32_128, d_model=12, d_ff=16, d_kv=3, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = tf.T5ForConditionalGeneration(config).eval()
    words = WordVerbalizer(tokenizer, {"entailment": "yes", "contradiction": "no", "neutral": "maybe"})
    prompt = PromptModel(model, Template(TEMPLATE, tokenizer, model), words)
    found = prompt(**prompt.collate([EXAMPLE]))
    assert found["loss"].isfinite()
    assert prompt.predict(EXAMPLE).label in words.classes
