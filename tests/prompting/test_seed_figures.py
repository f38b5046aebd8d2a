"""The figures that the seed prints for OpenPrompt's pipeline on T5, without a hub: its tokenizer is rebuilt from the printed ids.

The seed's tokens have two lone "▁". The first, ahead of the dot behind "down", is there because OpenPrompt tokenizes pieces one
by one. The second, behind the sentinel, is T5's own: its tokenizer starts anew behind a special token.
"""

import pytest
import torch
import transformers as tf

from deltakit.prompting import PromptModel, SlotOutput, Template, WordVerbalizer
from support.seed_tokenizer import LABEL_WORDS, t5_tokenizer
from support.seed_tokenizer import PRINTED_IDS as IDS
from support.seed_tokenizer import PRINTED_TOKENS as PIECES

TEMPLATE = '{"placeholder":"text_a"} Deduction: {"placeholder":"text_b"}. Is it correct? {"mask"}.'
EXAMPLE = {
    "text_a": "It was a complex language. Not written down but handed down. One might say it was peeled down.",
    "text_b": "the language was peeled down",
    "label": 0,
}
WRAPPED = [EXAMPLE["text_a"], " Deduction:", " the language was peeled down", ". Is it correct?", "<mask>", "."]
STRAY = 34
"""The place of the token that only piecewise tokenization has."""
DECODER_IDS = [0, 32099, 0]
SCORES = [[-2.6867, -0.1306, -2.9124], [-0.6579, -0.8735, -2.7400]]
"""What its verbalizer prints for random logits."""


@pytest.fixture(scope="module")
def tokenizer():
    return t5_tokenizer()


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
