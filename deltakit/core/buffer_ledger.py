"""Copies of the backbone's buffers, which forwards may change although all parameters are frozen.

BatchNorm's running statistics are the best known, and there are others: the vectors of `spectral_norm`, moving averages of
codebooks, caches. In training at a learning rate of zero, a ResNet-18 gives other classes after five steps (measured).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltakit.core.bare_weight import is_quantized
from deltakit.core.linear import is_compute_dtype, linear_sizes
from deltakit.core.paths import join, module_at, name_of, own_modules, parent_of

_LARGEST = 2**28
"""The number of bytes that are copied at most. Statistics are small; what is larger is data, such as packed experts."""


@dataclass
class BufferLedger:
    """The backbone's own values of its buffers by name. All deltas on one backbone share one ledger, made at the first attach.

    `unsaved`: the names of those that a state dict does not have, and so no file of a delta either. `empty`: those that are
    None until a forward fills them.
    """

    own: dict[str, Tensor] = field(default_factory=dict)
    unsaved: set[str] = field(default_factory=set)
    empty: list[str] = field(default_factory=list)

    def moved(self, module: nn.Module, path: str = "") -> list[str]:
        """Returns the names of the buffers that differ from the backbone's own values.

        Args:
            module, path: the backbone, or a module in it and its path. Then only the buffers of that module are compared.
        """
        return [
            name
            for name, value in self.own.items()
            if is_below(name, path) and differs(buffer_at(module, relative(name, path)), value)
        ]

    def empty_again(self, backbone: nn.Module) -> None:
        """Sets the buffers to None that were None, when the last delta is detached."""
        for name in self.empty:
            if buffer_at(backbone, name) is not None:
                module_at(backbone, parent_of(name))._buffers[name_of(name)] = None  # type: ignore[union-attr]

    def accept(self, name: str, value: Tensor) -> None:
        """Makes a value the backbone's own."""
        self.own[name] = value.detach().clone()


def copy_buffers(backbone: nn.Module) -> BufferLedger:
    """Returns copies of a backbone's buffers: the smallest first, up to 256 MiB together."""
    found = list(_buffers(backbone))
    left, kept = _LARGEST, set()
    for name, tensor, _ in sorted(found, key=lambda entry: entry[1].nbytes):
        left -= tensor.nbytes
        if left < 0:
            break
        kept.add(name)
    return BufferLedger(
        {name: tensor.detach().clone() for name, tensor, _ in found if name in kept},
        {name for name, _, saved in found if not saved},
        [
            join(path, key)
            for path, module in own_modules(backbone)
            for key in module._buffers
            if module._buffers[key] is None
        ],
    )


def buffer_at(backbone: nn.Module, name: str) -> Tensor | None:
    """Returns the buffer of a name; None if it is gone."""
    path, _, key = name.rpartition(".")
    module = module_at(backbone, path)
    return module._buffers.get(key) if module is not None else None


def is_below(name: str, path: str) -> bool:
    """Returns whether a name is that of something in the module at a path."""
    return not path or name.startswith(f"{path}.")


def relative(name: str, path: str) -> str:
    """Returns a name as it is seen from the module at a path."""
    return name.removeprefix(f"{path}.") if path else name


def _buffers(backbone: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yields the name of each buffer that can be copied, the buffer, and whether a state dict has it."""
    for path, module in own_modules(backbone):
        if module._buffers and not _is_packed(module):
            for key, tensor in module._buffers.items():
                # Offloaded buffers have no values here. Other types and dtypes are those of packed weights.
                if type(tensor) is Tensor and not tensor.is_meta and not _is_float8(tensor):
                    yield join(path, key), tensor, key not in module._non_persistent_buffers_set


def _is_packed(module: nn.Module) -> bool:
    # Quantized layers keep their weights in buffers, which no forward changes.
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return any(map(is_quantized, own)) or (linear_sizes(module) is not None and not own)


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not is_compute_dtype(tensor.dtype)


def differs(here: Tensor | None, own: Tensor) -> bool:
    """Returns whether a buffer has other values than a copy of it; not if it is gone or has no values here."""
    if here is None or here.is_meta:
        return False
    if here.shape != own.shape:
        return True
    # torch's own batch norm changes its statistics without a new version of the tensor, so the values are compared. The user
    # may have moved the model to another device or dtype since.
    own = own.to(here.device, here.dtype)
    if torch.equal(here, own):
        return False
    floats = here.is_floating_point() or here.is_complex()
    return not (floats and torch.allclose(here, own, rtol=0, atol=0, equal_nan=True))
