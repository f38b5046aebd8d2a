"""`decorate`: a function that hands its calls to another one, with the signature of the first."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any


def decorate(
    func: Callable[..., Any], caller: Callable[..., Any], extras: tuple[Any, ...] = (), kwsyntax: bool = False
) -> Callable[..., Any]:
    """Returns a function with `func`'s signature that returns `caller(func, *extras, *args, **kwargs)`.

    Args:
        kwsyntax: whether arguments stay as they were passed. By default those that have a position are passed by position,
            and defaults are passed, too.
    """
    signature = inspect.signature(func)

    @wraps(func)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        if not kwsyntax:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs = bound.args, bound.kwargs
        return caller(func, *extras, *args, **kwargs)

    return decorated
