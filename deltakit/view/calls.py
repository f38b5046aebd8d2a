"""What a module did in a forward, and how the columns of a tree say it."""

from typing import NamedTuple

from deltakit.view.units import flops_in_words

OF_A_FORWARD = ("output", "calls", "flops")
"""The columns that a tree has if it is shown with inputs."""


class Calls(NamedTuple):
    """How often a module was called in a forward, the shapes of what it returned last, and the FLOPs of all its calls."""

    times: int
    shapes: tuple[tuple[int, ...], ...]
    flops: int


def cells_of(calls: Calls | None, modules: int) -> dict[str, str]:
    """Returns the cells of the columns: shapes and calls of each module, and the FLOPs of all of them.

    Args:
        modules: the number of modules on the row.
    """
    if calls is None:
        return {}
    shapes = [str(list(shape)) for shape in calls.shapes]
    return {
        "output": f"{shapes[0]} +{len(shapes) - 1}" if len(shapes) > 1 else "".join(shapes),
        "calls": f"{calls.times} call{'' if calls.times == 1 else 's'}",
        "flops": flops_in_words(calls.flops * modules),
    }
