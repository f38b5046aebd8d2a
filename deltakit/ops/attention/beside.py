"""Attention of its own beside the module's: o + g softmax(q P_k^T) P_v, with a softmax that is not the module's.

Zhang et al. 2023, https://arxiv.org/abs/2303.16199, section 3.2. With a gate g of zero the module's output is exact.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.errors import StateError
from deltakit.ops.attention.function_mode import PrefixMode
from deltakit.ops.attention.kernel import AttentionPrefix


class AttentionBeside(AttentionPrefix):
    """The interface of such attention to the attention module that is its parent. The author writes `attended`."""

    scalable: ClassVar[bool] = True

    def attended(
        self, module: nn.Module
    ) -> tuple[Float[Tensor, "heads own d_k"], Float[Tensor, "heads own d_v"], Float[Tensor, "1"]]:
        """Returns the keys and values that every query of the module attends to, and the gate on the result."""
        raise NotImplementedError(f"{type(self).__name__} does not override attended")


def beside(
    found: Sequence[AttentionBeside],
    module: nn.Module,
    query: Float[Tensor, "examples query_heads queries d_k"],
    scaling: float | None,
) -> Float[Tensor, "examples query_heads queries d_v"]:
    """Returns the sum of what several of them add to the output of a module's attention, before its output projection.

    Args:
        scaling: the factor on the products of queries and keys; by default 1 / √d_k.

    Raises:
        StateError: if the keys do not fit the queries.
    """
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    total: Any = 0
    for one in found:
        key, value, gate = (part.to(query.dtype) for part in one.attended(module))
        if query.shape[1] % len(key) or query.shape[-1] != key.shape[-1]:
            raise StateError(
                f"{type(module).__name__}: a prompt for {len(key)} heads of size {key.shape[-1]} does not fit queries of "
                f"shape {tuple(query.shape)}: expected [examples, heads, length, d]; omit this module with exclude="
            )
        times = query.shape[1] // len(key)
        scores = query @ key.repeat_interleave(times, 0).mT * scaling
        mixed = F.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value.repeat_interleave(times, 0)
        own = mixed * (gate * one.strength)
        batch = one.batch
        if batch is not None and one.record is not None:
            # Only for its own examples, and exactly nothing for the others.
            rows = batch.of(one.record.name, query, module)
            own = torch.zeros_like(own).index_copy(0, rows, own[rows])
        total = total + own
    return total


class BesideMode(PrefixMode):
    """Adds such attention in one forward of a module that calls torch's `scaled_dot_product_attention`."""

    def __init__(self, module: nn.Module, found: Sequence[AttentionBeside]) -> None:
        empty = torch.empty(0, 0, 0)
        super().__init__(module, empty, empty)
        self.found = found

    def check(self) -> None:
        if not self.finished:
            raise StateError(
                f"{type(self.module).__name__}: its forward did not call scaled_dot_product_attention, which the prompt needs"
                "; omit this module with exclude="
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention or self.over:
            return output
        self.finished += 1
        query = args[0] if args else (kwargs or {})["query"]
        return output + beside(self.found, self.module, query, (kwargs or {}).get("scale"))
