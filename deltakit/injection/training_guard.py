"""The check that a training forward trains something of each delta that is trainable."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltakit.core import DeltaModule, Record, delta_children, own_modules, own_parameters
from deltakit.errors import StateError, warn


@dataclass
class _Watched:
    """One delta, and where one of its parameters was last seen that requires gradients."""

    record: Any
    holder: nn.Module | None = None
    name: str = ""
    warned: bool = False


class TrainingGuard:
    """Raises an error in a training forward if a delta is trainable and none of its parameters requires gradients.

    The flags can change after attaching: `requires_grad_(False)` on a part of the model, or a library that freezes all it
    does not know. Training would run and change nothing. The hook stands on the backbone alone, and reads one flag of each
    delta in a training forward.
    """

    def __init__(self) -> None:
        self.deltas: list[_Watched] = []

    def follow(self, records: Iterable[Record]) -> None:
        """Watches these deltas, and no others."""
        known = {watched.record: watched for watched in self.deltas}
        self.deltas = [known.get(record) or _Watched(record) for record in records]
        for watched in self.deltas:
            watched.warned = False

    def __call__(self, backbone: nn.Module, args: Any) -> None:
        """Checks the flags.

        Raises:
            StateError: if none of the parameters of a trainable delta requires gradients, or the backbone was made under
                `torch.inference_mode` and gradients are asked for.
        """
        if self.deltas and self.deltas[0].record.grad_ledger.inference and torch.is_grad_enabled():
            _refuse_inference(self.deltas)
        if not backbone.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        for watched in self.deltas:
            if watched.record.weights_before_merge:
                _warn_merged(watched)
                continue
            holder = watched.holder
            parameter = holder._parameters.get(watched.name) if holder is not None else None
            if parameter is None or not parameter.requires_grad:
                _check(backbone, watched)


def _refuse_inference(deltas: Iterable[_Watched]) -> None:
    records = [watched.record for watched in deltas]
    if any(isinstance(record, Record) and record.trainable and record.live for record in records):
        raise StateError(
            f"{records[0].grad_ledger.inference}: the backbone was made under torch.inference_mode(), and torch takes no "
            "gradients through such tensors; make or load the model outside of it, or call it under torch.no_grad()"
        )


def _warn_merged(watched: _Watched) -> None:
    record = watched.record
    if isinstance(record, Record) and record.trainable and record.active and not watched.warned:
        watched.warned = True
        warn(
            f"delta {record.name!r} is merged into the weights, and this is a forward in training mode: its parameters take "
            "no part, so a backward pass would not train them; unmerge() it before training, or call model.eval(); or set its "
            "trainable = False if it is not to be trained"
        )


def _modules_of(backbone: nn.Module, record: Record) -> Iterator[DeltaModule]:
    # Looked up instead of kept: a check usually ends at the first of them, and each attach would collect those of all deltas.
    for _, target in own_modules(backbone):
        for module in delta_children(target).values() if target._modules else ():
            if module.record is record:
                yield module


def _check(backbone: nn.Module, watched: _Watched) -> None:
    record = watched.record
    if not isinstance(record, Record) or not record.trainable or not record.live:
        return
    # A model is frozen before it is traced for inference.
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return
    watched.holder, count = None, 0
    for module in _modules_of(backbone, record):
        for name, parameter, _ in module.trained_parameters():
            if parameter.requires_grad:
                path, _, watched.name = name.rpartition(".")
                watched.holder, watched.warned = module.get_submodule(path), False
                return
            # `functional_call` puts plain tensors into the place of parameters.
            count += isinstance(parameter, nn.Parameter)
    if not count:
        return
    own = dict(own_parameters(backbone))
    head = [name for name in record.fully_trained if name in own and own[name].requires_grad]
    message = (
        f"delta {record.name!r} is trainable, but none of the {count} parameters of its modules requires gradients in this "
        "training forward, so they would not be trained: something froze them after attach(), such as requires_grad_(False) "
        "or another library; set delta.trainable = True after that, or delta.trainable = False if it is not to be trained"
    )
    if not head:
        raise StateError(message)
    # Some train the head alone for a while. So this may be intended.
    if not (watched.warned or record.only_full):
        watched.warned = True
        warn(f"{message}; of this delta only {head[0]} is trained")
