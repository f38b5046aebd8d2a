"""Which weights a class reads itself instead of calling their module, found in the code of its methods."""

import dis
import inspect
from itertools import takewhile
from types import CodeType
from typing import Any

# What may be asked of a weight without its values having any effect.
_HARMLESS = frozenset(
    {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad", "data_ptr"}
)
_ASKING = frozenset({"isinstance", "hasattr", "getattr", "setattr", "type", "id"})
# Methods that no forward calls.
_OUTSIDE = ("init", "reset", "load", "save", "resize", "tie", "extra_repr", "prune")


def reads(kind: type, chain: str) -> bool:
    """Whether a class's methods read the values of a chain of attributes of `self`, such as `out_proj.weight`.

    Classes of torch itself count as reading none: `nn.MultiheadAttention` is known, and others call their modules while
    hooks are on.
    """
    wanted = chain.split(".")
    if not all(name.isidentifier() for name in wanted):
        return False
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for name, method in vars(base).items():
            function = inspect.unwrap(method) if callable(method) else None
            called = inspect.isfunction(function) and not any(word in name for word in _OUTSIDE)
            if called and _in_code(function.__code__, wanted):  # type: ignore[union-attr]
                return True
    return False


def _in_code(code: CodeType, wanted: list[str]) -> bool:
    if any(isinstance(inner, CodeType) and _in_code(inner, wanted) for inner in code.co_consts):
        return True
    if not set(wanted) <= set(code.co_names):
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    for place, step in enumerate(steps):
        if not _loads_self(step) or (place and steps[place - 1].argval in _ASKING):
            continue
        names = [str(following.argval) for following in takewhile(_loads_attribute, steps[place + 1 :])]
        if names[: len(wanted)] == wanted and not _HARMLESS.intersection(names[len(wanted) :][:1]):
            return True
    return False


def _loads_attribute(step: Any) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _loads_self(step: Any) -> bool:
    """Whether an instruction puts `self` on the stack last, in the spelling of any Python from 3.10 on."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD_FAST")):
        return False
    return step.argval == "self" or (isinstance(step.argval, tuple) and step.argval[-1] == "self")
