"""Notices that a module's `forward` was called directly, so that torch ran none of the module's hooks.

sentence-transformers 6 calls `model.forward(...)`. The modules inside are called as usual, so a hook on one of them can look
at the Python frames around it: a call of the module itself has a frame of torch's `_call_impl` around that of its forward.
"""

import sys
from collections.abc import Callable
from types import FrameType

import torch
from torch import nn

_CALL = nn.Module._call_impl.__code__


def called_directly(wanted: Callable[[nn.Module], bool]) -> nn.Module | None:
    """Returns the innermost wanted module whose forward runs now, if that forward was called directly; else None.

    None also inside compiled code, whose frames are not those of the source.
    """
    if torch.compiler.is_compiling():
        return None
    found: nn.Module | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if found is None:
            found = _wanted_in(frame, wanted)
        elif (code is _CALL and frame.f_locals.get("self") is found) or _is_dynamo(code.co_filename):
            return None
        frame = frame.f_back
    return found


def _wanted_in(frame: FrameType, wanted: Callable[[nn.Module], bool]) -> nn.Module | None:
    code = frame.f_code
    # The name is compared first, because reading the variables of a frame copies them (before Python 3.13).
    if code.co_name != "forward" or not code.co_argcount:
        return None
    module = frame.f_locals.get(code.co_varnames[0])
    return module if isinstance(module, nn.Module) and wanted(module) else None


def _is_dynamo(filename: str) -> bool:
    return "_dynamo" in filename
