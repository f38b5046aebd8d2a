"""Sizes of blocks, for methods that cut features into blocks of one size."""

import math

from deltakit.core import Target
from deltakit.errors import OptionError


def block_size_for(
    target: Target,
    option: str,
    given: int | None,
    usual: int,
    *sizes: int,
    least: int = 1,
    step: int = 1,
    times: int = 1,
) -> int:
    """Returns the size of a target's blocks, which divides all the sizes.

    Args:
        option: the method and its option for the error message, such as "OFT(block_size".
        given: the size that the user chose; None for the largest one up to `usual`, or the smallest one if all are larger.
        sizes: the numbers of features that are cut into blocks.
        least: the smallest size.
        step: what the size is a multiple of.
        times: the size times this must divide the sizes, too.

    Raises:
        OptionError: if the given size does not fit, or none does.
    """
    whole = math.gcd(*sizes)
    fits = [size for size in range(step, whole // times + 1, step) if size >= least and whole % (size * times) == 0]
    features = " and ".join(map(str, dict.fromkeys(sizes)))
    method, _, name = option.partition("(")
    if not fits:
        raise OptionError(
            f"{target.named}: {method} needs a number of features that {max(least, step) * times} divides, found {features}; "
            "leave it out with exclude="
        )
    if given is None:
        return max((size for size in fits if size <= usual), default=fits[0])
    if given not in fits:
        near = min(fits, key=lambda fit: abs(fit - given))
        what = f" times {times}" if times > 1 else ""
        raise OptionError(
            f"{target.named}: {option}={given}){what} does not divide its {features} features; use {name}={near}, or leave it "
            "out with exclude="
        )
    return given
