"""Finds the parameters that PEFT's LoRA adapts by `target_parameters`, such as stacks of experts, and their factors.

PEFT wraps the module once for each of its targeted parameters, the first one innermost, and names the wrappers alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import permutations

from torch import Tensor

from deltakit.core import join, parent_of
from deltakit.errors import CheckpointError
from deltakit.files.formats.source import Source

INNER = ".base_layer"
_MOST = 5
"""The most parameters of one module whose orders are compared."""


def parameter_at(
    source: Source,
    targets: Sequence[str],
    path: str,
    pairs: Mapping[str, Mapping[str, Tensor]],
    rank: Callable[[str], int],
) -> str:
    """Returns the path of the parameter whose factors are at a path; "" if they are those of a module.

    Args:
        targets: the config's `target_parameters`, each the end of a parameter's path. Their order says nothing.
        pairs: the factors by all paths in the file.
        rank: what gives the rank of a parameter that the config says.

    Raises:
        CheckpointError: if the module has no such parameter.
    """
    owner, depth = _unwrapped(path)
    module = source.module(owner)
    if module is not None:
        names = list(module._parameters)
    else:
        names = sorted({target.rpartition(".")[2] for target in targets}, reverse=True)
    wanted = [name for name in names if f".{join(owner, name)}".endswith(tuple(f".{target}" for target in targets))]
    if not wanted and not depth:
        return ""
    wrappers = sorted((other for other in pairs if _unwrapped(other)[0] == owner), key=len, reverse=True)
    deepest = _unwrapped(wrappers[0])[1]
    if deepest - depth >= len(wanted):
        raise CheckpointError(
            f"{source.folder}: it has {deepest + 1} LoRAs on parameters of {owner}, and target_parameters names "
            f"{len(wanted)} there; load the backbone that the adapter was trained on"
        )
    if module is None:
        wanted = _in_order(wanted, [len(pairs[other]["A"]) for other in wrappers if "A" in pairs[other]], owner, rank)
    return join(owner, wanted[deepest - depth])


def _in_order(names: list[str], rows: Sequence[int], owner: str, rank: Callable[[str], int]) -> list[str]:
    """Returns the parameters in an order in which all are stacks of one number, which is all that the file alone tells."""
    if not 1 < len(names) == len(rows) <= _MOST:
        return names
    ranks = {name: rank(join(owner, name)) for name in names}
    fitting = (
        order
        for order in permutations(names)
        if len({Fraction(count, ranks[name]) for count, name in zip(rows, order, strict=True)}) == 1
    )
    return list(next(fitting, names))


def _unwrapped(path: str) -> tuple[str, int]:
    """Returns a path without the wrappers at its end, and their number."""
    owner = path
    while owner.endswith(INNER):
        owner = owner.removesuffix(INNER)
    return owner, (len(path) - len(owner)) // len(INNER)


def stacked(source: Source, parameter: str, pair: Mapping[str, Tensor], r: int) -> tuple[Tensor, Tensor]:
    """Returns A [*stack, r, d_in] and B [*stack, d_out, r] of a parameter, of PEFT's A [stack * r, d_in] and B.

    The columns of B have the stack within the rank, unlike the rows of A.

    Args:
        r: the rank that the config says, which counts without the backbone.

    Raises:
        CheckpointError: if the factors do not fit the stack, or it is unknown which of them is A.
    """
    a, b = pair["A"], pair["B"]
    held = source.own.get(parameter)
    # Without the backbone the stack is what the rank leaves, and a rank pattern may say another rank.
    count = max(1, a.shape[0] // r) if a.shape[0] % r == 0 else 1
    if held is not None:
        count = held.shape[0] if held.ndim == 3 else 1
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] % count or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{source.folder}: the factors of {parameter} have shapes {tuple(a.shape)} and {tuple(b.shape)}, which fit no "
            f"stack of {count}; load the backbone that the adapter was trained on"
        )
    if held is not None and held.ndim == 2:
        return a, b
    a, b = a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    if held is not None and held.ndim == 3 and _of_transposed(source, parameter, held, a):
        a, b = b.mT, a.mT
    return a.contiguous(), b.contiguous()


def _of_transposed(source: Source, parameter: str, held: Tensor, a: Tensor) -> bool:
    """Returns whether the product is that of the transposed matrices.

    PEFT before 0.19 took all stacks for [stack, d_in, d_out]. Later releases load square stacks of such files as another
    adapter (measured).

    Args:
        a: the factor that PEFT calls A, [stack, r, columns].

    Raises:
        CheckpointError: if neither the shapes nor the config tell.
    """
    if held.shape[0] == 1 or getattr(source.module(parent_of(parameter)), "is_transposed", False):
        # A stack of one is a matrix for all releases. Where a module stores its stacks that way, PEFT knows it since 0.19.
        return False
    d_out, d_in = held.shape[-2:]
    if d_out != d_in:
        return a.shape[-1] == d_out
    version = re.match(r"(\d+)\.(\d+)", str(source.config.get("peft_version")))
    if version is None:
        raise CheckpointError(
            f"{source.config_file}: it has no peft_version, which says how the LoRA on {parameter} is stored: matrices of "
            f'{d_out} x {d_in} do not tell; add "peft_version": "0.18.0" to it if PEFT up to 0.18 saved the adapter, and '
            '"peft_version": "0.19.0" if a later one or deltakit did'
        )
    return (int(version[1]), int(version[2])) < (0, 19)
