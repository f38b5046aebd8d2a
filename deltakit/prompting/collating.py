"""Makes a padded batch of encoded examples."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltakit.errors import OptionError


class Encoded(NamedTuple):
    """The ids of one example, without padding.

    `slots` are positions in the backbone's logits: of the slots themselves (mlm), of the last token (causal), or of the
    sentinels in `decoder_input_ids` (seq2seq).
    """

    input_ids: list[int]
    slots: list[int]
    token_type_ids: list[int] | None = None
    decoder_input_ids: list[int] | None = None


def batch_of(encoded: Sequence[Encoded], padding: int) -> dict[str, Tensor]:
    """Returns the batch of encoded examples: each tensor is [batch, length], `slots` [batch, slots].

    Examples are padded behind their text, also for causal models: so positions count from the first token, and no model needs
    to be told them.

    Args:
        padding: the id of padding.
    """
    ids = [one.input_ids for one in encoded]
    found = {"input_ids": _padded(ids, padding), "attention_mask": _padded([[1] * len(row) for row in ids], 0)}
    types = [one.token_type_ids for one in encoded if one.token_type_ids is not None]
    if types:
        found["token_type_ids"] = _padded(types, 0)
    targets = [one.decoder_input_ids for one in encoded if one.decoder_input_ids is not None]
    if targets:
        found["decoder_input_ids"] = torch.tensor(targets)
    found["slots"] = torch.tensor([one.slots for one in encoded])
    return found


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def labels_of(examples: Sequence[Mapping[str, Any]], classes: Sequence[str] | None = None) -> Tensor | None:
    """Returns the labels of examples [batch], from their field "label"; None if no example has one.

    Args:
        classes: the names that labels may be written as; without them only indices fit.

    Raises:
        OptionError: if only some examples have a label, or one is neither an index nor one of the names.
    """
    given = [example["label"] for example in examples if example.get("label") is not None]
    if not given:
        return None
    if len(given) < len(examples):
        raise OptionError(
            f"collate: {len(examples) - len(given)} of {len(examples)} examples have no label; give all of them one, or none"
        )
    return torch.tensor([_index(label, classes) for label in given])


def _index(label: Any, classes: Sequence[str] | None) -> int:
    if classes is not None and isinstance(label, str) and label in classes:
        return classes.index(label)
    # A number of torch or NumPy. An array of several is no label.
    if hasattr(label, "item") and (label.numel() if isinstance(label, Tensor) else label.size) == 1:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < (len(classes) if classes else 2**31):
        known = f"one of {', '.join(map(repr, classes))}, or an index below {len(classes)}" if classes else "an index"
        hint = "" if classes or not isinstance(label, str) else "; PromptModel.collate also takes the names of classes"
        raise OptionError(f"collate: expected as a label {known}, found {label!r}{hint}")
    return label
