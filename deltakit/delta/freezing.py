"""Freezes the backbone of a delta, except for the modules that the delta trains fully."""

from collections.abc import Sequence

from deltakit.core import Attachment, Selector, notice_moved_buffers
from deltakit.delta.claims import check_freezing
from deltakit.delta.contents import DeltaContents
from deltakit.delta.full_training import current_values, full_training_names, refresh_gradients, refuse_taken
from deltakit.delta.new_heads import TRAIN, Spelling, warn_frozen_head
from deltakit.injection import watch
from deltakit.selection import BackboneIndex


def freeze_backbone(delta: DeltaContents, train: Selector | None, spelling: Spelling = TRAIN) -> None:
    """Freezes the backbone of an attached delta, except for the modules that `train` selects: they are fully trained.

    Args:
        train: selectors of backbone modules. None differs from no selectors: it warns of a new head that would stay frozen.
        spelling: how the user's interface writes this, for the warning.

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
        warn_frozen_head(index, names, selectors, spelling)
    _freeze_but(attachment, selectors, names)


def _freeze_but(attachment: Attachment, selectors: tuple[str, ...], names: Sequence[str]) -> None:
    """Freezes all but the parameters with these names. After an error all is as it was."""
    backbone, record = attachment.backbone, attachment.record
    values = current_values(backbone, names, record)
    before = record.backbone_values, record.trained_values, record.train, record.freeze
    try:
        if record.active:
            record.backbone_values = record.backbone_values | values
        else:
            record.trained_values = record.trained_values | values
        record.train += tuple(selector for selector in selectors if selector not in record.train)
        record.freeze = True
        refresh_gradients(backbone, record.grad_ledger)
        watch(backbone)
    except BaseException:
        record.backbone_values, record.trained_values, record.train, record.freeze = before
        refresh_gradients(backbone, record.grad_ledger)
        watch(backbone)
        raise
