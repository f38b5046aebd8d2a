"""Tokenizers of four kinds, trained on a few lines, and tiny language models for them."""

from functools import cache

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "a film to remember it was great and good and fine",
    "the plot was bad and boring and awful",
    "yes no maybe so the answer is a word",
    "Is it correct? Deduction: the language was peeled down.",
    "New York is a city, people say; hello (world)!",
] * 3
TOKENIZERS = ("wordpiece", "bpe", "unigram", "metaspace")
SENTINELS = [f"<extra_id_{number}>" for number in range(3)]


@cache
def tokenizer_of(kind):
    """A fast tokenizer: WordPiece with a mask, byte-level BPE with a mask, and Unigram and Metaspace BPE with sentinels."""
    return {"wordpiece": _wordpiece, "bpe": _bpe, "unigram": _unigram, "metaspace": _metaspace}[kind]()


def _wordpiece():
    own = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    own.normalizer, own.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    own.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return tf.PreTrainedTokenizerFast(tokenizer_object=own, model_input_names=inputs, **names)


def _bpe():
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(LINES, trainer)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "mask_token"), special, strict=True))
    return tf.PreTrainedTokenizerFast(tokenizer_object=own, **names)


def _unigram():
    own = Tokenizer(models.Unigram())
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *SENTINELS]
    trainer = trainers.UnigramTrainer(vocab_size=230, special_tokens=special, unk_token="<unk>", show_progress=False)
    own.train_from_iterator(LINES, trainer)
    return _with_end(own)


def _metaspace():
    own = Tokenizer(models.BPE(unk_token="<unk>"))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *SENTINELS]
    own.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return _with_end(own)


def _with_end(own):
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_special_tokens=SENTINELS
    )


MODELS = ("bert", "roberta", "gpt2", "t5", "bart")
TOKENIZER_OF = {"bert": "wordpiece", "roberta": "bpe", "gpt2": "bpe", "t5": "unigram", "bart": "bpe"}
POSITIONS = 71


def model_of(kind, tokenizer=None, *, seed=0):
    """A tiny language model, in eval mode, with three ids more than its tokenizer has."""
    own = tokenizer_of(TOKENIZER_OF[kind]) if tokenizer is None else tokenizer
    torch.manual_seed(seed)
    return _MODELS[kind](len(own) + 3).eval()


def _encoder(config, model):
    def make(vocabulary):
        sizes = {"hidden_size": 28, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
        return model(config(vocab_size=vocabulary, max_position_embeddings=POSITIONS, **sizes))

    return make


def _gpt2(vocabulary):
    sizes = {"n_embd": 28, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=2, **sizes))


def _t5(vocabulary):
    sizes = {"d_model": 28, "d_ff": 44, "d_kv": 7, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=vocabulary, decoder_start_token_id=0, **sizes))


def _bart(vocabulary):
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 28, "encoder_ffn_dim": 44, "decoder_ffn_dim": 44, "max_position_embeddings": POSITIONS}
    ids = {
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    return tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=vocabulary, **layers, **sizes, **ids))


_MODELS = {
    "bert": _encoder(tf.BertConfig, tf.BertForMaskedLM),
    "roberta": _encoder(tf.RobertaConfig, tf.RobertaForMaskedLM),
    "gpt2": _gpt2,
    "t5": _t5,
    "bart": _bart,
}

REVIEW = '{"placeholder": "text"} It was {"mask"}'
"""A template that all of these models take."""
WORDS = {"good": ["good", "great"], "bad": ["bad", "awful"]}
REVIEWS = [
    {"text": "a film to remember", "label": "good"},
    {"text": "the plot was boring, bad and awful", "label": "bad"},
    {"text": "", "label": "good"},
]
