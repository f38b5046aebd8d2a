"""OpenPrompt's `load_plm`, and its tokenizer wrappers."""

from deltakit.openprompt.plms.lm import LMTokenizerWrapper
from deltakit.openprompt.plms.loading import load_plm
from deltakit.openprompt.plms.mlm import MLMTokenizerWrapper
from deltakit.openprompt.plms.seq2seq import T5LMTokenizerWrapper, T5TokenizerWrapper
from deltakit.openprompt.plms.utils import TokenizerWrapper

__all__ = [
    "LMTokenizerWrapper",
    "MLMTokenizerWrapper",
    "T5LMTokenizerWrapper",
    "T5TokenizerWrapper",
    "TokenizerWrapper",
    "load_plm",
]
