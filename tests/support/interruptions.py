"""Ctrl-C at a chosen line of Python code, and everything that an interruption must not leave behind."""

import inspect
import sys
from pathlib import Path

from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

import deltakit as dk
from support import models

PACKAGE = str(Path(dk.__file__).parent)
TABLES = ("_parameters", "_buffers", "_modules")


def interrupted(call, line=None, then=None, model=None):
    """Makes a call, raises KeyboardInterrupt ahead of a line that it runs, and returns how many lines it ran.

    The lines are those of deltakit and of torch's `nn.Module`, and with a model those of its modules' classes.

    Args:
        line: the number of the line among all lines that run in the files; None for no interruption.
        then: a second interruption, at this many function calls after the first one.
    """
    kinds = {inspect.getsourcefile(type(module)) for module in model.modules()} if model is not None else ()
    files = (PACKAGE, torch_module.__file__, *kinds)
    lines = calls = 0

    def in_frame(frame, event, _):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == line:
                if then is not None:
                    sys.setprofile(again)
                raise KeyboardInterrupt
        return in_frame

    def at_call(frame, event, _):
        name = frame.f_code.co_filename
        return in_frame if name.startswith(files) and name != __file__ else None

    def again(frame, event, _):
        nonlocal calls
        # Not in a generator: its `close` is a call, too, and Python drops what is raised there.
        generator = frame.f_code.co_flags & inspect.CO_GENERATOR
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and not generator:
            calls += 1
            if calls == then:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        call()
    except KeyboardInterrupt:
        assert line is not None
    finally:
        sys.settrace(before)
        sys.setprofile(None)
    return lines


def lines_of(call, wanted, model=None):
    """The numbers of lines at which to interrupt a call: about as many as wanted, spread over all that it runs."""
    count = interrupted(call, model=model)
    step = max(1, count // wanted)
    return range(1, count + 1, step)


def everything(model):
    """All that an interruption must not change: state, flags, hooks, attributes and torch's stack of modes."""
    attributes = {
        path: {name: value for name, value in vars(module).items() if name not in TABLES}
        for path, module in model.named_modules()
    }
    return models.snapshot(model), attributes, _get_current_function_mode_stack()


def unchanged(before, after):
    """Compares two results of `everything`."""
    models.same(before[0], after[0])
    assert before[1] == after[1]
    assert before[2] == after[2]
