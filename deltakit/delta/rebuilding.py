"""Builds the delta modules that a file describes. Until its tensors are compared, nothing in the file is believed."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deltakit.core import (
    DeltaModule,
    Method,
    Record,
    Target,
    join,
    label_among,
    label_of,
    own_children,
    without_start_values,
)
from deltakit.delta.planning import build
from deltakit.errors import CheckpointError
from deltakit.files import Saved, from_file, read_method
from deltakit.selection import BackboneIndex, find_targets

_NEW: frozenset[Callable[..., Any]] = frozenset(
    getattr(place, name)
    for place, names in (
        (torch, "empty empty_strided zeros ones full rand randn randint randperm arange linspace eye"),
        (torch, "empty_like zeros_like ones_like full_like rand_like randn_like randint_like"),
        (Tensor, "new_empty new_zeros new_ones new_full"),
    )
    for name in names.split()
)
_OF_SIZES = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn})
_SMALL = 2**20


class SizeLimit(TorchFunctionMode):
    """Refuses to create tensors that the file and the backbone give no reason for, before memory is taken for them.

    The options of a file may ask for a rank of a billion. No part of a delta is larger than the largest tensor in its file,
    or, if it is not saved (frozen tensors from a seed), than the largest weight of the backbone, or than a matrix with as many
    rows and columns as any target has (those that all targets share). All of them together are no larger than a few copies
    of the file and of that matrix, and one of the backbone.

    Args:
        saved: the tensors in the file.
        paths: the targets.
    """

    def __init__(self, saved: Mapping[str, Tensor], index: BackboneIndex, paths: Sequence[str] = ()) -> None:
        super().__init__()
        in_file = [tensor.numel() for tensor in saved.values()]
        in_backbone = [parameter.numel() for parameter in index.parameters.values()]
        weights = [getattr(index.module_at(path)[0], "weight", None) for path in paths]
        shapes = [weight.shape for weight in weights if isinstance(weight, Tensor) and weight.ndim == 2]
        widest = max((rows for rows, _ in shapes), default=0) * max((columns for _, columns in shapes), default=0)
        self.largest = max([_SMALL, widest, *in_file, *in_backbone])
        self.left = 4 * (_SMALL + sum(in_file) + widest) + sum(in_backbone)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NEW:
            size = _numel(func, args, kwargs)
            self.left -= size
            if size > self.largest or self.left < 0:
                raise CheckpointError(
                    f"its options ask for a tensor of {size:,} values, but the file and the backbone have none above "
                    f"{self.largest:,}; the file is damaged: save or download it again"
                )
        return func(*args, **kwargs)

    def admits(self, index: BackboneIndex, method: Method, targets: Sequence[Target]) -> bool:
        """Returns whether a method stays within the limit at all targets, told by one of each kind of layer.

        False also says that this cannot be told. Under the limit everything that asks a tensor for something takes longer,
        which doubled the time to build a delta module.
        """
        if not (type(method).build is Method.build and type(method).build_shared is Method.build_shared):
            return False
        alike: dict[object, list[Target]] = {}
        for target in targets:
            alike.setdefault(_same_sizes(target), []).append(target)
        if 2 * len(alike) > len(targets):
            return False
        left, needed = self.left, 0
        try:
            for same in alike.values():
                with self:
                    build(index, method, same[:1])
                needed += len(same) * (left - self.left)
                self.left = left
        except Exception:
            # What is wrong is told for the first target that has it.
            return False
        finally:
            self.left = left
        return needed <= left


def _same_sizes(target: Target) -> object:
    """Returns what is the same for targets at which the delta modules of a method have the same sizes."""
    module = target.module
    own = [(name, held.shape, held.dtype) for name, held in module._parameters.items() if held is not None]
    if not own or module._buffers or any(own_children(module)):
        return target.path
    return (type(module), target.part, target.weight_read is None, *own)


def _numel(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Returns the number of values of a tensor that is asked for."""
    if func in _OF_SIZES and args and all(type(size) is int and size >= 0 for size in args):
        # Nearly always, and ten times as fast as a tensor on the meta device.
        return math.prod(args)
    return int(func(*args, **{**kwargs, "device": "meta"}).numel())


def rebuilt(
    index: BackboneIndex, method: Method, paths: Sequence[str], saved: Mapping[str, Tensor], where: str
) -> dict[str, DeltaModule]:
    """Returns the delta modules of a saved method, at exactly the paths in its file.

    Args:
        saved: the tensors in the file.

    Raises:
        CheckpointError: if the method cannot be built with its options on this backbone, or has delta modules at other paths
            here.
    """
    check_paths(index, paths, where)
    with from_file(where, method.name), without_start_values():
        limit = SizeLimit(saved, index, paths)
        targets = [index.target(path) for path in paths]
        with nullcontext() if limit.admits(index, method, targets) else limit:
            built = build(index, method, targets)
    other = sorted(built.keys() ^ set(paths))
    if other:
        raise CheckpointError(
            f"{where}: {method.name} has {len(paths)} targets in the file, but would have {len(built)} on this backbone; they "
            f"differ at {other[0]}; load the backbone that the delta was trained on"
        )
    return built


def placed(index: BackboneIndex, saved: Saved, where: str) -> Saved:
    """Returns a saved delta in which all methods have targets and all tensors have names.

    Some formats do not name the targets of prefixes and prompts: they are those that the method takes on this backbone.

    Raises:
        CheckpointError: if the method takes none on this backbone, or other ones than the file has tensors for.
    """
    if not saved.in_order:
        return saved
    methods, tensors = list(saved.methods), dict(saved.tensors)
    labels = [entry["method"] for entry in methods]
    for number, states in saved.in_order.items():
        method, values = read_method(methods[number], where, f"methods[{number}]"), list(states)
        in_file = {str(place): tensor for place, state in enumerate(values) for tensor in state.values()}
        with from_file(where, method.name), SizeLimit(in_file, index), without_start_values():
            built = build(index, method, find_targets(index, method)[0])
        holders = [path for path, module in built.items() if module.saved_state()]
        if len(holders) != len(values):
            raise CheckpointError(
                f"{where}: it has the tensors of {len(values)} {method.name} modules, and this backbone has places for "
                f"{len(holders)}; load the backbone that the delta was trained on"
            )
        methods[number] = {**methods[number], "targets": list(built)}
        for path, state in zip(holders, values, strict=True):
            tensors |= {f"{join(path, label_among(labels, number))}.{name}": value for name, value in state.items()}
    return replace(saved, methods=methods, tensors=tensors)


def has_its_tensors(record: Record, number: int, built: Mapping[str, DeltaModule], saved: Mapping[str, Tensor]) -> bool:
    """Returns whether a file has all tensors of the delta modules that were built for the method `number`.

    The first method that lacks some is the last that is built: a short file may list thousands of methods, each on all layers.

    Args:
        saved: the tensors in the file.
    """
    label = label_of(record, number)
    return all(
        f"{join(path, label)}.{name}" in saved for path, module in built.items() for name in module.saved_state()
    )


def check_paths(known: BackboneIndex | Mapping[str, Tensor], paths: Sequence[str], where: str) -> None:
    """Checks that the backbone has all paths.

    Raises:
        CheckpointError: if one is missing.
    """
    missing = [path for path in paths if path not in known]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of its {len(paths)} targets are not in this backbone, such as {missing[0]}; load the "
            "backbone that the delta was trained on"
        )
