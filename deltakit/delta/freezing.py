"""Freezes the backbone of a delta, except for what the delta trains fully, and narrows state dicts to what is trained."""

from collections.abc import Collection, Sequence

from torch import nn

from deltakit.core import Attachment, Selector, notice_moved_buffers, own_parameters, tensors_of
from deltakit.delta.claims import check_freezing
from deltakit.delta.contents import DeltaContents
from deltakit.delta.full_training import current_values, full_training_names, refresh_gradients, refuse_taken
from deltakit.delta.new_heads import TRAIN, Spelling, warn_frozen_head
from deltakit.injection import narrow_state_dict, watch, widen_state_dict
from deltakit.selection import BackboneIndex


def freeze_backbone(delta: DeltaContents, train: Selector | None) -> None:
    """Freezes the backbone of an attached delta, except for the modules that `train` selects: they are fully trained.

    Args:
        train: selectors of backbone modules. None differs from no selectors: it warns of a new head that would stay frozen.

    Raises:
        SelectorError: if a selector is malformed or matches nothing.
        RoleError: if a role does not exist, or the backbone has no sure answer for it.
        StateError: if the delta is not attached, or `train` is given and the delta is merged, scaled or in a `rows` block, or
            a parameter is tied to one outside, quantized, offloaded, fully trained by another delta, or has another delta
            merged into it.
    """
    attachment = delta._attachment
    selectors = (train,) if isinstance(train, str) else tuple(train or ())
    check_freezing(attachment, training=bool(selectors))
    index = BackboneIndex(attachment.backbone)
    notice_moved_buffers(attachment.backbone, attachment.record)
    names = full_training_names(attachment.backbone, index.select(selectors)) if selectors else []
    refuse_taken(attachment, names)
    if train is None or selectors:
        warn_frozen_head(index, names, selectors, TRAIN)
    _train(attachment, selectors, names, freeze=True)


def freeze_parameters(
    delta: DeltaContents, frozen: Collection[int], train: Collection[int], selectors: Sequence[str], spelling: Spelling
) -> None:
    """Freezes parameters of a backbone as its user would: they stay frozen when the delta is detached.

    Args:
        frozen: the ids of these parameters.
        train: the ids of those that the delta trains fully and saves.
        selectors: what selected them, for the warning of a new head that would be frozen.
        spelling: how the user's interface writes this, for the same.

    Raises:
        StateError: if `train` has parameters and the delta is detached, merged, scaled or in a `rows` block, or one of them is
            tied to one outside, quantized, offloaded, fully trained by another delta, or has another delta merged into it.
    """
    attachment = delta._attachment
    backbone, ledger = attachment.backbone, attachment.record.grad_ledger
    names = [name for name, tensor in tensors_of(backbone) if id(tensor) in train]
    if names:
        check_freezing(attachment, training=True)
        notice_moved_buffers(backbone, attachment.record)
        names = full_training_names(backbone, names)
        refuse_taken(attachment, names)
    warn_frozen_head(BackboneIndex(backbone), names, selectors, spelling, frozen)
    if names:
        _train(attachment, names, names, freeze=attachment.record.freeze)
    own = {name: parameter for name, parameter in own_parameters(backbone) if id(parameter) in frozen}
    ledger.stay_frozen(own)
    for parameter in own.values():
        parameter.requires_grad_(False)
    if attachment.attached:
        refresh_gradients(backbone, ledger)


def keep_frozen(delta: DeltaContents) -> None:
    """Notes that the parameters of a delta's modules were frozen on purpose, if none of them requires gradients.

    A training forward is no error then. What the delta trains fully is trained all the same. Setting `delta.trainable`
    undoes it.
    """
    sites, record = delta._attachment.sites, delta._record
    if any(parameter.requires_grad for site in sites for _, parameter, _ in site.module.trained_parameters()):
        return
    if record.fully_trained:
        record.only_full = True
    else:
        record.trainable = False


def narrow(delta: DeltaContents, module: nn.Module, names: Collection[str]) -> None:
    """Leaves only these names in the state dict of a module while the delta is attached."""
    narrow_state_dict(module, names, delta._record)


def widen(delta: DeltaContents, module: nn.Module) -> None:
    """Undoes `narrow` for a module and the modules in it."""
    widen_state_dict(module, delta._record)


def _train(attachment: Attachment, selectors: Sequence[str], names: Sequence[str], *, freeze: bool) -> None:
    """Lets the delta train the tensors with these names fully, and freezes all others if `freeze`. After an error all is as it
    was."""
    backbone, record = attachment.backbone, attachment.record
    values = current_values(backbone, names, record)
    before = record.backbone_values, record.trained_values, record.train, record.freeze
    try:
        if record.active:
            record.backbone_values = record.backbone_values | values
        else:
            record.trained_values = record.trained_values | values
        record.train += tuple(selector for selector in selectors if selector not in record.train)
        record.freeze = freeze
        refresh_gradients(backbone, record.grad_ledger)
        watch(backbone)
    except BaseException:
        record.backbone_values, record.trained_values, record.train, record.freeze = before
        refresh_gradients(backbone, record.grad_ledger)
        watch(backbone)
        raise
