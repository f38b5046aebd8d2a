"""The tensors from which the training of a backbone's deltas continues, for the checkpoints of training frameworks.

A delta's file may hold less than training needs: the keys and values of a prefix, and not the MLP that computes them while it
is trained. So here delta modules have the keys of the model's own state dict.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from deltakit.core import Attachment, attachments_of, gathered, join, own_parameters, scatter, tensors_of
from deltakit.delta.checkpoint_marks import marks_of, refuse_other_run
from deltakit.delta.claims import refuse_merged
from deltakit.delta.full_training import fully_trained_tensors
from deltakit.delta.running_statistics import fitting, held_of
from deltakit.delta.tensors import load_state_dict, trained_values
from deltakit.errors import CheckpointError, StateError
from deltakit.files import TRAINED_DELTA, check_tensors, deltas_in, plain_tensors

# Fully trained tensors and running statistics have the backbone's names, so their keys name the delta that they belong to.
_OF_BACKBONE = "deltakit: of the delta "


def rooted_deltas(backbone: nn.Module) -> list[Attachment]:
    """Returns the deltas that are attached to a backbone itself, and not to a part of it."""
    return [found for found in attachments_of(backbone) if found.backbone is backbone]


def trains_only_deltas(backbone: nn.Module) -> bool:
    """Returns whether a backbone has deltas, and all that it trains belongs to them.

    Otherwise a checkpoint must hold the whole model: with `freeze=False` its own parameters are trained, too.

    Raises:
        StateError: if a delta is merged. No checkpoint could be loaded then: the weights have the delta, and unmerging would
            restore what was there before.
    """
    attachments = rooted_deltas(backbone)
    merged = next((found.record.name for found in attachments if found.record.merged), None)
    if merged is not None:
        raise StateError(
            f"delta {merged!r} is merged, and training could not resume from a checkpoint of this model; before training, "
            "call merge_and_unload() to make it a part of the model, or unmerge() to keep it as a delta"
        )
    theirs = {id(tensor) for found in attachments for tensor in fully_trained_tensors(found).values()}
    return bool(attachments) and not any(p.requires_grad and id(p) not in theirs for _, p in own_parameters(backbone))


def checkpoint_tensors(backbone: nn.Module, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint of a backbone's deltas: what they train, marks with their names and options, and
    a guard.

    They are copies on the CPU that share no memory.

    Loading them into a model without these deltas fails, also with `strict=False`: the guard has the name of one of the
    backbone's tensors, and no values.

    Args:
        given: the backbone's state dict, if an engine has gathered it. Otherwise, under FSDP2, every process must call this.
    """
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    attachments = rooted_deltas(backbone)
    for attachment in attachments:
        own = _training_state(attachment)
        usable = given if given is not None and attachment.record.active else {}
        keys = _keys(attachment, own)
        found |= {keys[name]: gathered(usable.get(name, tensor)) for name, tensor in own.items()}
        taken |= own.keys()
    guard = next((name for name, tensor in tensors_of(backbone) if name not in taken and tensor.ndim), None)
    found |= {guard: torch.zeros(0)} if guard is not None else {}
    return plain_tensors(found | {TRAINED_DELTA + name: mark for name, mark in marks_of(attachments).items()})


def load_checkpoint(backbone: nn.Module, state: Mapping[str, Tensor], where: str = "the checkpoint") -> None:
    """Loads what `checkpoint_tensors` returned.

    Raises:
        BackboneMismatch: if the backbone is another one.
        CheckpointError: if the attached deltas have other names, options or tensors, or another order.
            Nothing is changed then.
        StateError: if a delta is merged.
    """
    refuse_other_deltas(backbone, deltas_in(state), where)
    # The guard is the only one without values.
    found = {key: value for key, value in state.items() if not key.startswith(TRAINED_DELTA) and value.shape != (0,)}
    expected: dict[str, Tensor] = {}
    loads = []
    for attachment in rooted_deltas(backbone):
        refuse_merged(attachment.record, "loading a checkpoint")
        before = _training_state(attachment)
        mark = _mark_of(attachment)
        of_backbone = {key.removeprefix(mark): value for key, value in found.items() if key.startswith(mark)}
        values = {name: found[name] for name in _of_modules(attachment) if name in found} | of_backbone
        wanted = fitting(attachment, values, before)
        keys = _keys(attachment, wanted)
        expected |= {keys[name]: tensor for name, tensor in wanted.items()}
        loads.append((attachment, values, before))
    check_tensors(
        found,
        expected,
        own={key for key in expected if key.startswith(_OF_BACKBONE)},
        where=where,
        advice="attach the deltas with the methods, options and train= that they had",
    )
    marks = {key.removeprefix(TRAINED_DELTA): value for key, value in state.items() if key.startswith(TRAINED_DELTA)}
    refuse_other_run(rooted_deltas(backbone), marks, where)
    for attachment, values, before in loads:
        load_state_dict(attachment, values, before, _put)


def refuse_other_deltas(backbone: nn.Module, names: Collection[str], where: str) -> None:
    """Refuses a checkpoint of other deltas than those that are attached.

    Raises:
        CheckpointError: if they differ.
    """
    here = sorted(attachment.record.name for attachment in rooted_deltas(backbone))
    if here != sorted(names):
        there = f"the attached are {_words(here)}" if here else "none is attached"
        raise CheckpointError(
            f"{where}: it holds what these deltas have trained: {_words(sorted(names))}; {there}; attach the same deltas by "
            "the same names before loading it"
        )


def _words(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _mark_of(attachment: Attachment) -> str:
    return f"{_OF_BACKBONE}{attachment.record.name}: "


def _keys(attachment: Attachment, names: Iterable[str]) -> dict[str, str]:
    """Returns the key of each tensor of a delta in a checkpoint."""
    modules, mark = _of_modules(attachment), _mark_of(attachment)
    return {name: name if name in modules else mark + name for name in names}


def _training_state(attachment: Attachment) -> dict[str, Tensor]:
    held_of(attachment)
    return _of_modules(attachment) | {name: value.detach() for name, value in trained_values(attachment).items()}


def _of_modules(attachment: Attachment) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site in attachment.sites:
        found |= site.module.state_dict(prefix=join(site.owner, f"{site.key}."))
    return found


def _put(attachment: Attachment, state: Mapping[str, Tensor]) -> None:
    for name, tensor in _training_state(attachment).items():
        scatter(tensor, state[name])
