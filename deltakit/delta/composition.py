"""Which delta modules on one weight may be merged, so that the outputs stay the same.

A merged delta acts with the weight, before all others at its target. That changes nothing for a delta that was attached later
and changes the output, for one that changes the input for both, and if both only add to the output.
"""

from collections.abc import Sequence

from deltakit.core import Attachment, Record, Site, are_apart, attachments_of
from deltakit.errors import StateError, TargetError


def refuse_composed(name: str, sites: Sequence[Site]) -> None:
    """Refuses to merge methods of one delta that follow each other on one weight, where their changes do not add up.

    Each computes its change from the bare weight. A method that changes the output otherwise than by adding to it must come
    first. A method that changes the input must be alone.

    Raises:
        TargetError: if the changes do not add up.
    """
    for number, site in enumerate(sites):
        for earlier in sites[:number]:
            adds = site.module.has_weight_form and (earlier.module.has_weight_form or not earlier.module.acts_before())
            if not are_apart(earlier.module.part, site.module.part) and not adds:
                both = " and ".join(module.word() for module in (earlier.module, site.module))
                raise TargetError(
                    f"{name}: {both} follow each other here, and their changes of this weight do not add up; leave the delta "
                    "attached"
                )


def refuse_beside_live(attachment: Attachment) -> None:
    """Refuses to merge a delta beside another one, if together they would then compute something else.

    Raises:
        StateError: if there is such a delta.
    """
    for other in attachments_of(attachment.backbone):
        if other.record is not attachment.record and other.record.live:
            _refuse(attachment, other, advice=f"detach {other.record.name!r} first, or leave both attached")


def refuse_beside_merged(attachment: Attachment) -> None:
    """Refuses to attach or activate a delta beside a merged one, if together they would compute something else.

    Raises:
        StateError: if there is such a delta.
    """
    for other in attachments_of(attachment.backbone):
        if other.record is not attachment.record and other.record.merged:
            _refuse(other, attachment, advice=f"unmerge() {other.record.name!r} first")


def _refuse(merged: Attachment, live: Attachment, advice: str) -> None:
    at = {id(site.target): site for site in merged.sites}
    for site in live.sites:
        mine = at.get(id(site.target))
        if mine is None or are_apart(mine.module.part, site.module.part):
            continue
        if _same_function(mine, site, merged.record, live.record):
            continue
        raise StateError(
            f"{site.path}: delta {live.record.name!r} has a {site.module.word()} here, and with {merged.record.name!r} merged "
            f"the two together compute something else than with both attached; {advice}"
        )


def _same_function(merged: Site, live: Site, merged_record: Record, live_record: Record) -> bool:
    # What only adds (it has a weight form) commutes with what only adds, and not with what scales the output.
    both_add = live.module.has_weight_form and merged.module.has_weight_form
    # A weight patch acts with the weight, too, whenever it was attached.
    later = live_record.order > merged_record.order and live.module.weight_read is None
    follows = later or both_add or live.module.acts_before()
    return follows and not merged.module.acts_before() and not live.module.reads_weight
