"""Whether a function of the user can be called as it will be."""

from inspect import signature
from typing import Any

from torch import nn


def takes(function: Any, *args: Any) -> bool:
    """Returns whether a function takes these arguments. A class or a module is not meant where a function is expected.

    >>> takes(lambda part: part, "weights"), takes(lambda: 1, "weights"), takes(int)
    (True, False, False)
    """
    if isinstance(function, type | nn.Module):
        return False
    try:
        signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:
        # Some functions of C code have no signature.
        pass
    return True
