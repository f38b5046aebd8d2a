"""Counts the work of a call without a clock: the byte-code instructions that Python runs for it."""

import gc
import sys

# The checks of shapes in tests are none of the library's work.
_CHECKS = ("beartype", "jaxtyping")


def steps(call):
    """The number of instructions of a call. The same call gives the same number on every machine, once caches are warm.

    What a single instruction does inside C code, such as `in` on a list, counts as one.
    """
    count = 0

    def step(frame, event, argument):
        nonlocal count
        if event == "call" and any(name in frame.f_code.co_filename for name in _CHECKS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return step

    before = sys.gettrace()
    # What the garbage collector calls belongs to what ran before.
    gc.collect()
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
