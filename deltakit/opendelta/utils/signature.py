"""The names of a function's arguments."""

import inspect
from collections.abc import Callable
from typing import Any

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def get_arg_names(f: Callable[..., Any]) -> list[str]:
    """Returns the names of a function's arguments, without those of `*args` and `**kwargs`."""
    return [name for name, parameter in inspect.signature(f).parameters.items() if parameter.kind in _NAMED]


def get_arg_names_inside_func(func: Callable[..., Any]) -> list[str]:
    """Returns the names of the arguments of a function or a method, without `self`."""
    return [name for name in get_arg_names(func) if name != "self"]
