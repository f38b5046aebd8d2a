"""Finds and replaces the hidden states in a module's arguments and in its result.

This is the only file that knows the containers (tuples, lists, ModelOutputs) that hold them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltakit.errors import TargetError

# The keyword names under which transformers and torch modules take their hidden states or ids.
_INPUT_NAMES = ("hidden_states", "input", "x", "inputs", "hidden_state", "input_ids", "src", "query")


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the tensor of hidden states (or ids) that a module was called with, positional or by keyword.

    If no argument is a tensor, it is the first tensor in a list (the blocks of DenseNet take all earlier features).

    Raises:
        TargetError: if there is no such tensor.
    """
    if args and isinstance(args[0], Tensor):
        return args[0]
    values = (*args, *kwargs.values())
    if not any(isinstance(value, Tensor) for value in values):
        lists = [value for value in values if isinstance(value, list | tuple) and value]
        if lists and isinstance(lists[0][0], Tensor):
            return lists[0][0]
    key = _input_key(args, kwargs)
    found: Tensor = args[key] if isinstance(key, int) else kwargs[key]
    return found


def replace_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call, with the tensor that `hidden_input` finds replaced by `new`.

    Raises:
        TargetError: if no argument is a tensor.
    """
    key = _input_key(args, kwargs)
    if isinstance(key, int):
        return (*args[:key], new, *args[key + 1 :]), dict(kwargs)
    return args, {**kwargs, key: new}


def _input_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    """Returns the index or the keyword of the hidden states among the arguments."""
    if args and isinstance(args[0], Tensor):
        return 0
    for name in _INPUT_NAMES:
        if isinstance(kwargs.get(name), Tensor):
            return name
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in arguments:
        if isinstance(value, Tensor):
            return key
    raise TargetError(
        f"no tensor among the arguments of the target: expected hidden states, found {_kinds(args, kwargs)}; "
        "attach to a module that takes its hidden states as an argument"
    )


def hidden_output(output: Any) -> Tensor:
    """Returns the hidden states in a module's result: the result itself, or its first floating-point tensor.

    Raises:
        TargetError: if the result holds no floating-point tensor.
    """
    if isinstance(output, Tensor):
        return output
    key = _hidden_key(output)
    value: Tensor = output[key]
    return value


def replace_hidden(output: Any, new: Tensor) -> Any:
    """Returns a result of the same type as `output`, with its hidden states replaced by `new`.

    Raises:
        TargetError: if the result holds no floating-point tensor.
    """
    if isinstance(output, Tensor):
        return new
    key = _hidden_key(output)
    if isinstance(output, tuple):
        items = (*output[:key], new, *output[key + 1 :])
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, list):
        return [*output[:key], new, *output[key + 1 :]]
    # A ModelOutput holds each value twice, as an entry and as an attribute. Its constructor sets both.
    return type(output)(**{**output, key: new})


def _hidden_key(output: Any) -> Any:
    if isinstance(output, tuple | list):
        items: Any = enumerate(output)
    elif isinstance(output, Mapping):
        if isinstance(output.get("last_hidden_state"), Tensor):
            return "last_hidden_state"
        items = output.items()
    else:
        items = ()
    for key, value in items:
        if isinstance(value, Tensor) and torch.is_floating_point(value):
            return key
    raise TargetError(
        f"no floating-point tensor in the result of the target: expected a tensor, or a tuple, list or mapping "
        f"with one, found {type(output).__name__}; attach to a module whose result holds its hidden states"
    )


def _kinds(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    kinds = [type(value).__name__ for value in args]
    kinds += [f"{name}={type(value).__name__}" for name, value in kwargs.items()]
    return ", ".join(kinds) or "no arguments"
