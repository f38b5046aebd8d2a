"""Records the calls of modules in one forward: how often, what they return, and their floating-point operations."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_on_cpus(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _of_groups(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Those of a grouped product: each row of the left side meets the matrix of one group, as in layers of experts."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return int(2 * groups * left[-2] * left[-1] * right[-1])


# torch's counter knows the attention kernels of GPUs, and counts nothing for that of CPUs, nor for grouped products (2.13).
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpus
}
if hasattr(torch.ops.aten, "_grouped_mm"):
    _FORMULAS[torch.ops.aten._grouped_mm] = _of_groups


@dataclass
class Recorded:
    """The calls of one module: how often, the shapes of the tensors that its last call returned, and the sum of its FLOPs.

    The FLOPs are those of torch's own counter: matrix products, convolutions and attention, two for each multiplication with
    an addition; those of the modules inside and of deltas are in it.
    """

    times: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()
    flops: int = 0


class _Recorder:
    """The two hooks of one module."""

    def __init__(self, record: Recorded, counter: FlopCounterMode) -> None:
        self.record, self.counter = record, counter
        self.started: list[int] = []

    def before(self, module: nn.Module, args: Any) -> None:
        self.started.append(self.counter.get_total_flops())

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.record.times += 1
        self.record.shapes = tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
        self.record.flops += self.counter.get_total_flops() - self.started.pop()


@contextmanager
def recorded_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Recorded]]:
    """Records the calls of modules inside a `with` block, without gradients.

    Args:
        modules: what is observed, by path.
    """
    found = {path: Recorded() for path in modules}
    handles: list[Any] = []
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    try:
        with counter, torch.no_grad():
            for path, module in modules.items():
                recorder = _Recorder(found[path], counter)
                handles.append(module.register_forward_pre_hook(recorder.before))
                handles.append(module.register_forward_hook(recorder.after))
            yield found
    finally:
        for handle in handles:
            handle.remove()
