"""PromptDataLoader: wraps and tokenizes a data set, and makes its batches."""

import inspect
from collections.abc import Iterator
from typing import Any, Literal

from torch.utils.data import DataLoader

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.openprompt.data_utils.utils import InputFeatures
from deltakit.openprompt.prompt_base import Template


class PromptDataLoader:
    """Yields batches of a data set as `InputFeatures`.

    Args:
        dataset: a sequence of `InputExample`s.
        template: the template.
        tokenizer_wrapper: the tokenizer wrapper, or `tokenizer` and `tokenizer_wrapper_class`, from which it is made with
            `max_seq_length`, `truncate_method`, `decoder_max_length`, `decode_from_pad`, `predict_eos_token` and
            `create_token_type_ids`.
        verbalizer: as of OpenPrompt; if it has `wrap_one_example`, that is called first.
        batch_size, shuffle, drop_last: as of torch's `DataLoader`.
        teacher_forcing: only False is served.

    Raises:
        OptionError: if the data set is empty, nothing says how to tokenize it, or an example cannot be tokenized.
    """

    @checked
    def __init__(
        self,
        dataset: Any,
        template: Template,
        tokenizer_wrapper: Any = None,
        tokenizer: Any = None,
        tokenizer_wrapper_class: Any = None,
        verbalizer: Any = None,
        max_seq_length: int = 512,
        batch_size: int = 1,
        shuffle: bool = False,
        teacher_forcing: bool = False,
        decoder_max_length: int = -1,
        predict_eos_token: bool = False,
        truncate_method: Literal["tail", "head", "balanced"] = "tail",
        drop_last: bool = False,
        decode_from_pad: bool = True,
        create_token_type_ids: bool = False,
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not len(dataset):
            raise OptionError("PromptDataLoader: the dataset is empty, or no sequence of InputExamples")
        options = {
            "max_seq_length": max_seq_length,
            "tokenizer": tokenizer,
            "truncate_method": truncate_method,
            "decoder_max_length": decoder_max_length,
            "decode_from_pad": decode_from_pad,
            "predict_eos_token": predict_eos_token,
            "create_token_type_ids": create_token_type_ids,
        }
        self.raw_dataset, self.template, self.verbalizer = dataset, template, verbalizer
        self.tokenizer_wrapper = tokenizer_wrapper or _made(tokenizer_wrapper_class, options)
        first = getattr(verbalizer, "wrap_one_example", lambda example: example)
        self.wrapped_dataset = [template.wrap_one_example(first(dataset[place])) for place in range(len(dataset))]
        self.tensor_dataset = [
            InputFeatures(
                **self.tokenizer_wrapper.tokenize_one_example(wrapped, teacher_forcing), **wrapped[1]
            ).to_tensor()
            for wrapped in self.wrapped_dataset
        ]
        self.dataloader: DataLoader[Any] = DataLoader(
            self.tensor_dataset,  # type: ignore[arg-type]
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=InputFeatures.collate_fct,
            drop_last=drop_last,
        )

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[InputFeatures]:
        return iter(self.dataloader)


def _made(kind: Any, options: dict[str, Any]) -> Any:
    if kind is None or options["tokenizer"] is None:
        raise OptionError(
            "PromptDataLoader: nothing says how to tokenize; pass tokenizer= and tokenizer_wrapper_class=, as load_plm returns"
        )
    # A wrapper of the user's own may take fewer options.
    taken = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in options.items() if name in taken})
