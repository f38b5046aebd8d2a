"""A tokenizer as T5's, whose vocabulary has the pieces and ids that OpenPrompt's tutorial prints, and data like its own."""

from functools import cache

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

PRINTED_IDS = [
    94, 47, 3, 9, 1561, 1612, 5, 933, 1545, 323, 68, 14014, 323, 5, 555, 429, 497, 34, 47, 158, 400, 26, 323, 5, 374, 8291, 10,
    8, 1612, 47, 158, 400, 26, 323, 3, 5, 27, 7, 34, 2024, 58, 32099, 3, 5, 1,
]  # fmt: skip
PRINTED_TOKENS = [
    "▁It", "▁was", "▁", "a", "▁complex", "▁language", ".", "▁Not", "▁written", "▁down", "▁but", "▁handed", "▁down", ".", "▁One",
    "▁might", "▁say", "▁it", "▁was", "▁pe", "ele", "d", "▁down", ".", "▁De", "duction", ":", "▁the", "▁language", "▁was", "▁pe",
    "ele", "d", "▁down", "▁", ".", "▁I", "s", "▁it", "▁correct", "?", "<extra_id_0>", "▁", ".", "</s>",
]  # fmt: skip
"""What the tutorial prints for the first example, without padding."""
LABEL_WORDS = {"▁yes": 4273, "▁no": 150, "▁maybe": 2087}
CB = [
    ("It was a complex language. Not written down but handed down. One might say it was peeled down.",
     "the language was peeled down", 0),
    ("It was a language. One might say it was not correct.", "the language was correct", 1),
    ("One might say it was handed down.", "it was written down", 2),
]  # fmt: skip
"""Premise, hypothesis and label; the first is the tutorial's."""


@cache
def t5_tokenizer(joined_sentinels=False):
    """The tokenizer, with 32,100 tokens of which most are never found in a text.

    Args:
        joined_sentinels: whether the text behind a sentinel starts no word, as in T5's tokenizers without `legacy`.
    """
    own = {**dict(zip(PRINTED_TOKENS, PRINTED_IDS, strict=True)), **LABEL_WORDS, "▁not": 59, "<pad>": 0, "<unk>": 2}
    own |= {f"<extra_id_{number}>": 32_099 - number for number in range(100)}
    # Characters, so that the words of tests are known.
    own |= {char: 20_000 + place for place, char in enumerate("bcefghijklmnopqrtuvwxyz")}
    known = {one: token for token, one in own.items()}
    # All other pieces are characters of private use. Fewer pieces have the higher score.
    scores = [(known.get(one, chr(0xF0000 + one)), -1.0) for one in range(32_100)]
    if not joined_sentinels:
        return tf.T5Tokenizer(vocab=scores, extra_ids=100)
    made = Tokenizer(models.Unigram(scores, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    sentinels = [token for token in own if token.startswith("<extra")]
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=sentinels, **names)


def t5(seed=0):
    """A tiny T5 for this tokenizer, with T5's 28 ids more."""
    torch.manual_seed(seed)
    sizes = {"d_model": 12, "d_ff": 20, "d_kv": 5, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=32_128, decoder_start_token_id=0, **sizes)).eval()


def super_glue_cb():
    """Stands for `load_dataset("super_glue", "cb")`."""
    names = ("premise", "hypothesis", "label")
    rows = [{**dict(zip(names, row, strict=True)), "idx": place} for place, row in enumerate(CB)]
    return {"train": rows, "validation": rows, "test": rows[:1]}


def saved_t5(path):
    """Saves model and tokenizer to a folder, and returns its name."""
    t5().save_pretrained(path)
    t5_tokenizer().save_pretrained(path)
    return str(path)
