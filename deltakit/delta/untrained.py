"""Notices at saving that a delta is still as it was attached, or that its training left something out."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deltakit.core import Attachment, Sample, Start, is_sharded, parameters_of, version_of
from deltakit.delta.in_training import by_method
from deltakit.errors import warn

_SITES, _VALUES = 8, 16


def start_of(attachment: Attachment) -> Start:
    """Returns what shows later whether a new delta was trained."""
    return Start(attachment.version(), {name: _sample(parameter) for name, parameter in _sampled(attachment)})


def warn_untrained(attachment: Attachment, state: Mapping[str, Tensor]) -> None:
    """Warns if none of the parameters of a delta's modules has other values than when it was attached.

    Args:
        state: its tensors as they are saved.
    """
    start = attachment.record.start
    if start is None:
        return
    now = {name: (parameter, state.get(name, parameter)) for name, parameter in _sampled(attachment)}
    there = {name: pair for name, pair in now.items() if not pair[1].is_meta and not is_sharded(pair[1])}
    if attachment.version() > start.version and not any(
        version_of(parameter) > start.samples[name].version
        for name, (parameter, _) in there.items()
        if name in start.samples
    ):
        # What was trained is not among the samples.
        return
    # Some optimisers write behind torch's back, through `.data` or in a kernel of their own. Then the version stays the same
    # and the values differ. With a learning rate of zero it is the other way round.
    same = [_is_same(there[name][1], sample) for name, sample in start.samples.items() if name in there]
    if same and all(same):
        warn(
            f"delta {attachment.record.name!r} is saved as it was attached: none of the parameters of its modules has changed "
            "since. If you trained it, the optimiser may have been made before attach(), or the model that was trained is "
            "another one than that of this handle: dk.deltas(model) returns a model's own"
        )


def warn_unfinished(attachment: Attachment) -> None:
    """Warns of what was left out while a delta was trained, such as the steps of AdaLoRA."""
    start = attachment.record.start
    each = sum(len(parameters_of(site.module)) for site in attachment.sites)
    # Values that were set once, by hand, are no training run.
    if start is not None and attachment.version() - start.version <= each:
        return
    for method, modules in by_method(attachment):
        what = method.unfinished(modules, loaded=start is None)
        if what:
            warn(f"delta {attachment.record.name!r}: {what}")


def _sampled(attachment: Attachment) -> Iterator[tuple[str, Tensor]]:
    """Yields the trained parameters of a few sites by their names in files."""
    sites = attachment.sites
    for site in sites[:: max(1, len(sites) // _SITES)][:_SITES]:
        for name, parameter, _ in site.module.trained_parameters():
            if not parameter.is_meta:
                yield attachment.named(site, name), parameter


def _sample(tensor: Tensor) -> Sample:
    flat = tensor.detach().reshape(-1)
    return Sample(
        version_of(tensor), flat[:: max(1, len(flat) // _VALUES)][:_VALUES].clone(), float(flat.double().sum())
    )


def _is_same(now: Tensor, before: Sample) -> bool:
    found = _sample(now)
    values = before.values.to(now.device, now.dtype)
    # The sum of rounded values is another one, and so may be that of another device.
    moved = (now.dtype, now.device) != (before.values.dtype, before.values.device)
    return torch.equal(found.values, values) and (moved or found.total == before.total)
