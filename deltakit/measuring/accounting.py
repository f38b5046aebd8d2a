"""`account(model)`: the parameters, gradients, optimiser state and activations of a model with its deltas, in bytes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import (
    DeltaModule,
    Inputs,
    checked,
    class_name,
    delta_children,
    fold,
    global_bytes,
    join,
    local_bytes,
    logical_parameters,
    own_modules,
    records_in,
)
from deltakit.measuring.kept_activations import kept_activations
from deltakit.measuring.optimizer_state import Optimizers, optimizer_state
from deltakit.measuring.part import Part
from deltakit.view import Printed, Table, binary_size, share

_TITLES = {
    "backbone_frozen": "backbone, frozen",
    "backbone_trainable": "backbone, trainable",
    "delta_frozen": "deltas, frozen",
    "delta_trainable": "deltas, trainable",
    "buffers": "buffers",
    "kept": "kept to restore the backbone",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations kept",
}
"""The parts that are added up."""


@dataclass(frozen=True, repr=False)
class Account(Printed):
    """The bytes of a model in training, part by part.

    `parts`: each parameter and buffer counts once. `tied` is what a model without tied weights would have more, and
    `quantized` the part of the parameters whose weights are packed; neither is added to the sum.
    """

    owner: str
    parts: Mapping[str, Part]
    tied: Part
    quantized: Part

    @property
    def bytes(self) -> int:
        """The sum of all parts whose bytes are known."""
        return sum(part.bytes or 0 for part in self.parts.values())

    def _parts(self) -> Iterator[str | Table]:
        yield f"account of {self.owner}"
        sharded = any(part.local != part.bytes for part in self.parts.values())
        rows = [_row(title, self.parts[key], sharded) for key, title in _TITLES.items() if _is_shown(self.parts[key])]
        local = (binary_size(sum(part.local or 0 for part in self.parts.values())),) if sharded else ()
        unknown = [_TITLES[key] for key, part in self.parts.items() if part.bytes is None]
        rows.append(("sum", "", binary_size(self.bytes), *local, f"without {', '.join(unknown)}" if unknown else ""))
        heads = ("", "values", "bytes", *(("in this process",) if sharded else ()), "")
        yield Table(heads, rows, right=(1, 2, 3)[: 2 + sharded])
        if self.tied.count:
            yield f"  tied weights save {self.tied.count:,} values, {binary_size(self.tied.bytes or 0)}: {self.tied.note}"
        if self.quantized.count:
            yield f"  quantized: {self.quantized.count:,} values are stored in {binary_size(self.quantized.bytes or 0)}"

    def to_dict(self) -> dict[str, Any]:
        """Returns its contents as data that `json.dumps` takes."""
        parts = {key: asdict(part) for key, part in self.parts.items()}
        return {
            "model": self.owner,
            "parts": parts,
            "tied": asdict(self.tied),
            "quantized": asdict(self.quantized),
            "bytes": self.bytes,
        }


@checked
def account(backbone: nn.Module, *, optimizer: Optimizers | None = None, inputs: Inputs | None = None) -> Account:
    """Returns how many values and bytes the parts of a model take in training. Nothing is changed.

    >>> import deltakit as dk
    >>> model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    >>> delta = dk.attach(model, dk.LoRA(r=2, at="0"))
    >>> account(model, optimizer=torch.optim.AdamW)
    account of Sequential
                         values  bytes
      backbone, frozen       66  264 B
      deltas, trainable      24   96 B  36.4 % of the backbone's 66
      gradients              24   96 B  after a backward pass; none now
      optimizer state        50  200 B  AdamW, after its first step
      activations kept               ?  pass inputs= to measure
      sum                        656 B  without activations kept

    Args:
        optimizer: an optimiser, its class, or a function that makes one of a list of parameters. The state of an optimiser
            that has made a step is counted. Otherwise it is measured by a step on copies without memory, and unknown if the
            optimiser cannot do such a step.
        inputs: what the model is called with: a tensor, a list of arguments, or a dictionary of named ones. One forward in
            the current mode of the model then tells how many bytes the backward pass needs; on the meta device attention
            may need others than on a real one. Buffers and random numbers stay as they are.

    Raises:
        TargetError: if the backbone is not a `torch.nn.Module`.
        OptionError: if the forward fails with these inputs, the class or function needs other arguments than parameters, or
            it does not return an optimiser.
    """
    walk = _Walk(backbone)
    trainable = [p for p in backbone.parameters() if p.requires_grad]
    walk.parts["gradients"] = _gradients(trainable)
    state = Part(None, None, None, "pass optimizer= to measure")
    if optimizer is not None:
        state = optimizer_state(optimizer, trainable)
    activations = Part(None, None, None, "pass inputs= to measure")
    if inputs is not None:
        size = kept_activations(backbone, inputs)
        activations = Part(
            None, size, size, f"of one forward in {'training' if backbone.training else 'evaluation'} mode"
        )
    walk.parts |= {"optimizer_state": state, "activations": activations}
    own = sum(walk.parts[key].count or 0 for key in ("backbone_frozen", "backbone_trainable"))
    deltas = walk.parts["delta_trainable"]
    deltas.note = f"{share(deltas.count or 0, own)} of the backbone's {own:,}"
    return Account(class_name(backbone), {key: walk.parts[key] for key in _TITLES}, walk.tied, walk.quantized)


@dataclass
class _Walk:
    """Counts each tensor of a backbone and of its deltas once."""

    backbone: nn.Module
    parts: dict[str, Part] = field(default_factory=lambda: {key: Part() for key in _TITLES})
    tied: Part = field(default_factory=Part)
    quantized: Part = field(default_factory=Part)
    seen: dict[int, str] = field(default_factory=dict)
    ties: dict[str, list[str]] = field(default_factory=dict)
    """The other names of each tied parameter, by its first name."""

    def __post_init__(self) -> None:
        for path, module in own_modules(self.backbone):
            self._backbone(path, module)
        self.tied.note = "; ".join(f"{', '.join(fold(names))} = {first}" for first, names in self.ties.items())
        for path, module in own_modules(self.backbone):
            for child in delta_children(module).values():
                self._delta(path, child)
        for record in records_in(self.backbone):
            for kept in (record.backbone_values, record.weights_before_merge, record.buffer_ledger.own):
                for name, tensor in kept.items():
                    if id(tensor) not in self.seen:
                        self.seen[id(tensor)] = name
                        self.parts["kept"].add(tensor, tensor.numel())

    def _backbone(self, path: str, module: nn.Module) -> None:
        for name, shape, stored in logical_parameters(module):
            own, count = join(path, name), shape.numel() if shape is not None else 0
            if id(stored) in self.seen:
                self.tied.add(stored, count)
                self.ties.setdefault(self.seen[id(stored)], []).append(own)
                continue
            self.seen[id(stored)] = own
            self._part("backbone", stored).add(stored, count)
            if global_bytes(stored) < 2 * count:
                # No float of a backbone that is not quantized has less than 16 bits.
                self.quantized.add(stored, count)
        # What is left are scales and zero points of packed weights, which the architecture does not have.
        self._rest(path, module, "backbone")

    def _delta(self, path: str, module: DeltaModule) -> None:
        for name, child in module.named_modules():
            for key, parameter in child._parameters.items():
                if parameter is not None and id(parameter) not in self.seen:
                    self.seen[id(parameter)] = join(join(path, name), key)
                    self._part("delta", parameter).add(parameter, parameter.numel())
            self._rest(path, child, "delta")

    def _rest(self, path: str, module: nn.Module, owner: str) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in self.seen:
                self.seen[id(parameter)] = join(path, name)
                self._part(owner, parameter).add(parameter, 0)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in self.seen:
                self.seen[id(buffer)] = join(path, name)
                self.parts["buffers"].add(buffer, buffer.numel())

    def _part(self, owner: str, tensor: Tensor) -> Part:
        return self.parts[f"{owner}_{'trainable' if tensor.requires_grad else 'frozen'}"]


def _gradients(trainable: Iterable[nn.Parameter]) -> Part:
    found, now = Part(), 0
    for parameter in trainable:
        lazy = torch.nn.parameter.is_lazy(parameter)
        found.add(parameter, 0 if lazy else int(getattr(parameter, "ds_numel", parameter.numel())))
        now += local_bytes(parameter.grad) if parameter.grad is not None else 0
    found.note = f"after a backward pass; {binary_size(now) if now else 'none'} now"
    return found


def _is_shown(part: Part) -> bool:
    return bool(part.count or part.bytes or part.bytes is None)


def _row(title: str, part: Part, sharded: bool) -> tuple[str, ...]:
    sizes = [part.bytes, part.local] if sharded else [part.bytes]
    shown = ["?" if size is None else binary_size(size) for size in sizes]
    return (title, "" if part.count is None else f"{part.count:,}", *shown, part.note)
