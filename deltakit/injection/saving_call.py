"""Finds the running call that saves a model, from within the state dict that it asks for.

A function on the class (`PreTrainedModel.save_pretrained(model, folder)`), or one of a model around the backbone, asks the
backbone for nothing but its state dict. The Python frames around that say what it is for.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

_METHOD, _OF_ACCELERATE = "save_pretrained", "save_model"
# The Trainer's name for the folders of its checkpoints (`PREFIX_CHECKPOINT_DIR`).
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def is_checkpoint(folder: Path) -> bool:
    """Returns whether a folder has the name of a checkpoint of the Trainer."""
    return _CHECKPOINT.fullmatch(folder.name) is not None


class SavingCall(NamedTuple):
    """A running call that saves a model into a folder.

    Args:
        of_accelerate: whether it is `Accelerator.save_model`; else it is a `save_pretrained`.
        arguments: all arguments of the call, by their names.
    """

    model: nn.Module
    folder: Path
    of_accelerate: bool
    arguments: Mapping[str, Any]

    @property
    def leaves_deltas_out(self) -> bool:
        """Whether what it writes must load as a model without deltas."""
        return not (self.of_accelerate or is_checkpoint(self.folder))


def saving_call(module: nn.Module) -> SavingCall | None:
    """Returns the innermost running call of this thread that saves a module or a model around it; None if there is none."""
    for frame in _frames():
        code = frame.f_code
        # The name is compared first, because reading the variables of a frame copies them (before Python 3.13).
        if code.co_name not in (_METHOD, _OF_ACCELERATE):
            continue
        of_accelerate = code.co_name == _OF_ACCELERATE
        if of_accelerate and str(frame.f_globals.get("__name__")).partition(".")[0] != "accelerate":
            continue
        names = code.co_varnames[of_accelerate : code.co_argcount + code.co_kwonlyargcount]
        found = frame.f_locals
        model, folder = (*map(found.get, names[:2]), None, None)[:2]
        if isinstance(model, nn.Module) and isinstance(folder, str | os.PathLike) and _holds(model, module):
            return SavingCall(model, Path(folder), of_accelerate, {name: found.get(name) for name in names})
    return None


def in_method_of(module: nn.Module) -> bool:
    """Returns whether a method of a module is running in this thread."""
    for frame in _frames():
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self" and frame.f_locals.get("self") is module:
            return True
    return False


def _holds(model: nn.Module, module: nn.Module) -> bool:
    return any(inner is module for inner in model.modules())


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
