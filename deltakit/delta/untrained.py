"""Notices at saving that a delta is still as it was attached, so that somebody trained something else."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deltakit.core import Attachment, Start, is_sharded
from deltakit.errors import warn

_SITES, _VALUES = 8, 16


def start_of(attachment: Attachment) -> Start:
    """Returns what shows later whether a new delta was trained."""
    return Start(attachment.version(), {name: _sample(parameter) for name, parameter in _sampled(attachment)})


def warn_untrained(attachment: Attachment, state: Mapping[str, Tensor]) -> None:
    """Warns if none of the parameters of a delta's modules has changed since it was attached.

    Args:
        state: its tensors as they are saved.
    """
    start = attachment.record.start
    if start is None or attachment.version() > start.version:
        return
    # Some optimisers write behind torch's back, through `.data` or in a kernel of their own. Then the version stays the same
    # and the values differ.
    now = {name: state.get(name, parameter) for name, parameter in _sampled(attachment)}
    same = [
        torch.equal(_sample(now[name]), value.to(now[name].device, now[name].dtype))
        for name, value in start.values.items()
        if name in now and not now[name].is_meta and not is_sharded(now[name])
    ]
    if same and all(same):
        warn(
            f"delta {attachment.record.name!r} is saved as it was attached: none of the parameters of its modules has changed "
            "since. If you trained it, the optimiser may have been made before attach(), or the model that was trained is "
            "another one than that of this handle: dk.deltas(model) returns a model's own"
        )


def _sampled(attachment: Attachment) -> Iterator[tuple[str, Tensor]]:
    """Yields the trained parameters of a few sites by their names in files."""
    sites = attachment.sites
    for site in sites[:: max(1, len(sites) // _SITES)][:_SITES]:
        for name, parameter, _ in site.module.trained_parameters():
            if not parameter.is_meta:
                yield attachment.named(site, name), parameter


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _VALUES)][:_VALUES].clone()
