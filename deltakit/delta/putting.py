"""Puts all modules and values of a delta into its backbone, and takes them out again, also after an interruption.

Ctrl-C may come between any two lines. So attaching undoes what it did, detaching goes on to its end, and both leave the delta
findable until the last step: `detach` of its handle, or of `deltas(model)`, does the rest.
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from deltakit.core import (
    Attachment,
    FirstSizes,
    RunningCall,
    Site,
    drop_interrupted_calls,
    forget_notes,
    keyed,
    note_record,
    notice_moved_buffers,
    records_of,
    shapes_of,
)
from deltakit.delta.changed_backbone import logical_sizes
from deltakit.delta.full_training import put_backbone_values, put_trained_values, refresh_gradients, refuse_taken
from deltakit.delta.interrupted import finished
from deltakit.delta.pretrained import follow_saving
from deltakit.injection import (
    change_begins,
    forget_first_forward,
    put,
    scopes_of,
    sort_patches,
    take,
    take_patches,
    watch,
    watch_first_forward,
    widen_state_dict,
)


def put_all(attachment: Attachment) -> None:
    """Attaches a delta, or leaves the backbone as it was if that fails or is interrupted."""
    backbone, record = attachment.backbone, attachment.record
    try:
        change_begins(backbone, RunningCall(sys._getframe()))
        # Ahead of the change: an interruption behind it leaves one too many, which is leaving, and not one too few.
        note_record(backbone, record)
        for site, key in keyed(record, attachment.sites):
            if site.module.record is not record:
                site.module.record = record
            if site.module.first_sizes is None:
                site.module.first_sizes = FirstSizes(shapes_of(site.module), logical_sizes(site.target))
            else:
                _follow(site)
            attachment.scopes[site.module] = put(backbone, site.target, key, site.module)
        for scope in dict.fromkeys(scope for scopes in attachment.scopes.values() for scope in scopes):
            sort_patches(scope)
        if record.active:
            put_trained_values(attachment)
        refresh_gradients(backbone, record.grad_ledger)
        record.version = attachment.version()
        watch_first_forward(attachment)
        watch(backbone)
        follow_saving(backbone)
    except BaseException:
        take_all(attachment)
        raise


def _follow(site: Site) -> None:
    """Moves a delta module to the device of its target, which the user may have moved while the delta was detached."""
    here = _device_of(site.target._parameters.values())
    own = _device_of(site.module._parameters.values()) or _device_of(site.module.parameters_read())
    # Offloaded parameters have no device of their own.
    if here is not None and own is not None and here != own and "meta" not in (here.type, own.type):
        site.module.to(here)


def _device_of(parameters: Iterable[Tensor | None]) -> torch.device | None:
    for parameter in parameters:
        if parameter is not None:
            return parameter.device
    return None


def switch(attachment: Attachment, *, active: bool) -> None:
    """Switches a delta on or off. While it is off, the fully trained tensors have the backbone's own values.

    Raises:
        StateError: if another delta got running statistics of its own where this one has some, while it was off.
    """
    before = attachment.record.active
    if attachment.attached:
        # What moved so far belongs to the deltas that were active then.
        notice_moved_buffers(attachment.backbone, attachment.record)
        if active:
            refuse_taken(attachment, attachment.record.fully_trained)
    try:
        _switch(attachment, active)
    except BaseException:
        _switch(attachment, before)
        raise


def _switch(attachment: Attachment, active: bool) -> None:
    record = attachment.record
    record.active = active
    if (record.backbone_values or record.trained_values) and attachment.attached:
        (put_trained_values if active else put_backbone_values)(attachment)
        refresh_gradients(attachment.backbone, record.grad_ledger)
        watch(attachment.backbone)


@finished
def take_all(attachment: Attachment) -> None:
    """Detaches a delta of which everything or only a part is there."""
    backbone, record = attachment.backbone, attachment.record
    record.leaving = True
    change_begins(backbone, RunningCall(sys._getframe()))
    put_backbone_values(attachment)
    if record.buffer_ledger.empty and all(other.leaving for other in records_of(backbone)):
        record.buffer_ledger.empty_again(backbone)
    refresh_gradients(backbone, record.grad_ledger)
    forget_first_forward(attachment)
    drop_interrupted_calls()
    keys = {site.module: key for site, key in keyed(record, attachment.sites)}
    patched = [module for module in keys if module.weight_read is not None]
    for scope in dict.fromkeys(
        scope for module in patched for scope in attachment.scopes.get(module) or scopes_of(backbone, module)
    ):
        take_patches(scope, set(keys.values()), set(patched))
    # By the modules that are left a delta is found again, so the last of them goes last.
    first, *others = attachment.sites
    for site in others:
        take(site.target, keys[site.module], site.module)
    watch(backbone)
    follow_saving(backbone)
    if record.narrowed:
        widen_state_dict(backbone, record)
        record.narrowed = False
    take(first.target, keys[first.module], first.module)
    forget_notes()
    attachment.scopes.clear()
    record.leaving = False
