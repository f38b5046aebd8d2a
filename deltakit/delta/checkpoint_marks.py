"""What a training checkpoint says of each of its deltas, so that training does not resume from that of another run.

A state dict has only tensors, so each mark is one: the bytes of a JSON text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from deltakit.core import Attachment
from deltakit.errors import BackboneMismatch, CheckpointError
from deltakit.files import backbone_identity, differences, from_file

# Where a delta is, its tensors say; `keep` is about unmerging.
_NOT_COMPARED = ("at", "of", "exclude", "keep")


def marks_of(attachments: Sequence[Attachment]) -> dict[str, Tensor]:
    """Returns the mark of each delta of one backbone, by its name; the first says which backbone it is."""
    said = _said(attachments)
    for attachment in attachments[:1]:
        said[attachment.record.name]["backbone"] = backbone_identity(attachment.backbone)["fingerprint"]
    return {name: _written(entry) for name, entry in said.items()}


def common_mark(attachments: Sequence[Attachment]) -> Tensor:
    """Returns one mark of all deltas of a backbone, for a checkpoint that has the backbone's own tensors, too."""
    return _written(_said(attachments))


def refuse_other_run(attachments: Sequence[Attachment], marks: Mapping[str, Tensor], where: str) -> None:
    """Refuses a checkpoint whose marks, by the names of the deltas, do not fit the attached deltas and their backbone.

    Raises:
        BackboneMismatch: if it is another backbone.
        CheckpointError: if a delta has other options, the deltas were attached in another order, or a mark is damaged.
    """
    # Checkpoints of earlier versions have marks that say nothing.
    read = {name: _read(mark, name, where) for name, mark in marks.items() if mark.dtype == torch.uint8}
    _compare(attachments, {name: _checked(entry, name, where) for name, entry in read.items()}, where)


def refuse_other_options(attachments: Sequence[Attachment], common: Tensor, where: str) -> None:
    """Does the same with the mark of a checkpoint that has the backbone's own tensors, too.

    Raises:
        CheckpointError: if a delta has other options, the deltas were attached in another order, or the mark is damaged.
    """
    names = [attachment.record.name for attachment in attachments]
    said = _read(common, ", ".join(names), where)
    _compare(attachments, {name: _checked(said.get(name), name, where) for name in names}, where)


def _compare(attachments: Sequence[Attachment], said: Mapping[str, dict[str, Any]], where: str) -> None:
    if said.keys() != {attachment.record.name for attachment in attachments}:
        return
    for attachment in attachments:
        name, methods = attachment.record.name, attachment.record.methods
        for method, entry, here in zip(methods, said[name]["methods"], _options(attachment), strict=False):
            # An option that is newer than the checkpoint had its default.
            saved = (
                _in_json({field.name: field.default for field in fields(method) if field.default is not MISSING})
                | entry
            )
            other = [option for option in here if saved.get(option) != here[option]]
            if other:
                raise CheckpointError(
                    f"{where}: it was saved with other options of the delta {name!r}: "
                    + ", ".join(f"{option} was {saved.get(option)!r} and is {here[option]!r}" for option in other)
                    + "; attach the delta with the options that it had, or start a new run from its folder by dk.load"
                )
    names, order = [found.record.name for found in attachments], sorted(said, key=lambda name: said[name]["place"])
    if order != names:
        raise CheckpointError(
            f"{where}: its deltas were attached in the order {', '.join(order)}, and here in the order {', '.join(names)}; "
            "the states of the optimiser follow it, so attach them in the order of the checkpoint"
        )
    fingerprint = said[order[0]].get("backbone") if order else None
    if fingerprint is None:
        return
    with from_file(where, "backbone"):
        different = differences(fingerprint, backbone_identity(attachments[0].backbone)["fingerprint"])
    if different:
        raise BackboneMismatch(
            f"{where}: this is not the backbone that its deltas were trained on: {different[0]}; resume with that backbone"
        )


def _options(attachment: Attachment) -> list[dict[str, Any]]:
    """Returns what is compared of the options of each method, as JSON gives it back."""
    return [
        _in_json({option: value for option, value in method.to_dict().items() if option not in _NOT_COMPARED})
        for method in attachment.record.methods
    ]


def _in_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options as JSON gives them back: a tuple is a list there."""
    found: dict[str, Any] = json.loads(json.dumps(options))
    return found


def _said(attachments: Sequence[Attachment]) -> dict[str, dict[str, Any]]:
    return {
        attachment.record.name: {"place": place, "methods": _options(attachment)}
        for place, attachment in enumerate(attachments)
    }


def _written(said: Mapping[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


def _read(mark: Tensor, name: str, where: str) -> dict[str, Any]:
    try:
        said: Any = json.loads(bytes(mark.cpu().tolist()))
    except (ValueError, TypeError):
        said = None
    if not isinstance(said, dict):
        raise _damaged(name, where)
    return said


def _checked(said: Any, name: str, where: str) -> dict[str, Any]:
    try:
        fits = isinstance(said["place"], int) and all(isinstance(method, dict) for method in said["methods"])
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise _damaged(name, where)
    found: dict[str, Any] = said
    return found


def _damaged(name: str, where: str) -> CheckpointError:
    return CheckpointError(f"{where}: what it says of the delta {name!r} is damaged; use another checkpoint")
