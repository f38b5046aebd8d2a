"""Checkpoints that hold a whole model, because more of it is trained than its deltas.

Beside the tensors of the model and its deltas they have one mark: the names of the deltas are in its key, and their options
and order in its value. So training does not resume with other deltas there either.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltakit.core import module_at
from deltakit.delta.checkpoint_marks import common_mark, refuse_other_options
from deltakit.delta.training_state import refuse_other_deltas, rooted_deltas
from deltakit.files import deltas_by_prefix, read_tensors

# One key, because a checkpoint may be split into several files. transformers logs it if nothing is attached.
_MARK, _BETWEEN = "deltakit: attach these deltas first: ", ", "


def whole_checkpoint_mark(backbone: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Returns what a checkpoint of a whole model needs beside the model's state dict; nothing if it has no deltas.

    Args:
        prefix: of the backbone in that state dict.
    """
    attachments = rooted_deltas(backbone)
    names = _BETWEEN.join(attachment.record.name for attachment in attachments)
    return {f"{prefix}{_MARK}{names}": common_mark(attachments)} if attachments else {}


def take_mark(backbone: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Takes the mark of a backbone out of the state dict of a whole checkpoint, if it has one.

    Raises:
        CheckpointError: if the attached deltas have other names, options or another order.
    """
    for key in [key for key in state if key.startswith(prefix + _MARK)]:
        mark, where = state.pop(key), "the checkpoint"
        refuse_other_deltas(backbone, key.partition(_MARK)[2].split(_BETWEEN), where)
        refuse_other_options(rooted_deltas(backbone), mark, where)


def deltas_in_file(backbone: nn.Module, file: Path, where: str) -> list[str]:
    """Returns the names of the deltas whose checkpoint a file is; none if it is of a whole model, or there is none.

    The deltas may be on parts of the module.

    Raises:
        CheckpointError: if other deltas are attached, or the file is damaged.
    """
    keys: Iterable[str] = read_tensors(file, values=False) if file.is_file() else ()
    trained = deltas_by_prefix(keys)
    marked = [key.partition(_MARK) for key in keys if _MARK in key]
    for prefix, names in [*trained.items(), *((prefix, own.split(_BETWEEN)) for prefix, _, own in marked)]:
        # An engine may have wrapped the model that it saved.
        inner = module_at(backbone, prefix.removesuffix("."))
        refuse_other_deltas(backbone if inner is None else inner, names, where)
    return sorted({name for names in trained.values() for name in names})
