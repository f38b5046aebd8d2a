"""Counts the work of a call without a clock: the lines that Python runs for it."""

import gc
import sys

# The checks of shapes in tests are none of the library's work.
_CHECKS = ("beartype", "jaxtyping")


def steps(call):
    """The number of lines that a call runs. The same call gives the same number on every machine, once caches are warm.

    Each round of a loop or a comprehension counts, also if it is one line. C code, such as `in` on a list, does not.
    """
    count = 0

    def step(frame, event, argument):
        nonlocal count
        if event == "call" and any(name in frame.f_code.co_filename for name in _CHECKS):
            return None
        count += event == "line"
        return step

    before = sys.gettrace()
    # What the garbage collector calls belongs to what ran before. Collecting it first took most of the time: half a second in a
    # process that has run thousands of tests.
    gc.disable()
    sys.settrace(step)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def bend(counts):
    """How far the counts at n, 2n and 3n lie above a straight line, as a share of the first: about 0 for linear growth."""
    first, second, third = counts
    return (third - 2 * second + first) / first
