"""Examples, and what the tokenizer makes of them."""

import json
import pickle
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from deltakit.errors import OptionError


class InputExample:
    """One example. Templates read its attributes by their names, and `meta` by keys.

    Args:
        guid: an identifier.
        text_a, text_b: the texts.
        label: the index of its class.
        meta: other values that a template may use.
        tgt_text: the target text. Classification does not read it.
    """

    def __init__(
        self,
        guid: Any = None,
        text_a: str = "",
        text_b: str = "",
        label: int | None = None,
        meta: Mapping[str, Any] | None = None,
        tgt_text: str | Sequence[str] | None = None,
    ) -> None:
        self.guid, self.text_a, self.text_b, self.label = guid, text_a, text_b, label
        self.meta, self.tgt_text = dict(meta or {}), tgt_text

    def __repr__(self) -> str:
        return self.to_json_string()

    def to_dict(self) -> dict[str, Any]:
        """Returns a copy of its values."""
        return deepcopy(vars(self))

    def to_json_string(self) -> str:
        """Returns its values as JSON, and a line break."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def keys(self) -> list[str]:
        """Returns the names of its values that are not None."""
        return [name for name, value in vars(self).items() if value is not None]

    @staticmethod
    def load_examples(path: str) -> list["InputExample"]:
        """Returns the examples that `save_examples` has written. Pickles run code: load only files of your own."""
        return pickle.loads(Path(path).read_bytes())

    @staticmethod
    def save_examples(examples: list["InputExample"], path: str) -> None:
        """Writes examples to a file."""
        Path(path).write_bytes(pickle.dumps(examples))


_NAMES = (
    "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "label", "decoder_input_ids", "decoder_inputs_embeds",
    "soft_token_ids", "past_key_values", "loss_ids", "guid", "tgt_text", "encoded_tgt_text", "input_ids_len",
)  # fmt: skip
_NO_TENSORS = ("guid", "tgt_text", "encoded_tgt_text")


class InputFeatures(dict[str, Any]):
    """The ids and labels of an example or of a batch: a dict whose values are attributes, too.

    OpenPrompt's names are None where there is no value. Unlike there, any other name is kept, too.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        given = {**(values or {}), **more}
        super().__init__({name: value for name, value in given.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self or name in _NAMES:
            return self.get(name)
        raise AttributeError(f"InputFeatures has no {name!r}, only {', '.join(self)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_tensor(self) -> "InputFeatures":
        """Turns lists and numbers into tensors, in place, and returns itself."""
        for name, value in self.items():
            listed = value if isinstance(value, list) else [value]
            if name not in _NO_TENSORS and all(isinstance(one, (bool, int, float)) for one in listed):
                self[name] = torch.tensor(value)
        return self

    def to(self, device: Any = "cuda") -> "InputFeatures":
        """Moves its tensors to a device, in place, and returns itself."""
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(device)
        return self

    def cuda(self, device: Any = "cuda") -> "InputFeatures":
        """Moves its tensors to a GPU, in place, and returns itself."""
        return self.to(device)

    def to_dict(self, keep_none: bool = False) -> dict[str, Any]:
        """Returns its values as a dict; with `keep_none` also the names of OpenPrompt that have none."""
        return {**(dict.fromkeys(_NAMES) if keep_none else {}), **self}

    @staticmethod
    def collate_fct(batch: Sequence["InputFeatures"]) -> "InputFeatures":
        """Returns the batch of some examples: stacked tensors, and lists of what is no tensor.

        Raises:
            OptionError: if an example lacks what another one has, such as a label.
        """
        for one in batch:
            missing = {name for other in batch for name in other} - one.keys()
            if missing:
                names = ", ".join(sorted(missing))
                raise OptionError(
                    f"collate_fct: only some examples of the batch have {names}; give all of them one, or none"
                )
        return InputFeatures(
            **{
                name: [one[name] for one in batch]
                if name == "encoded_tgt_text"
                else default_collate([one[name] for one in batch])
                for name in batch[0]
            }
        )
