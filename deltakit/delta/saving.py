"""Saves and uploads a delta, in deltakit's own format or in another."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import takewhile
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from deltakit.core import (
    Attachment,
    Site,
    collections_paused,
    extra_tensors,
    is_extra,
    is_first,
    is_sharded,
    one_walk,
    wait_for_all,
)
from deltakit.delta import tensors
from deltakit.delta.as_loras import as_loras
from deltakit.delta.changed_backbone import refuse_changed
from deltakit.delta.claims import refuse_scaled
from deltakit.delta.contents import DeltaContents
from deltakit.delta.running_statistics import held_of
from deltakit.delta.untrained import warn_unfinished, warn_untrained
from deltakit.errors import warn
from deltakit.files import WRITERS, CardDetails, Written, delta_config, loaded_from, model_card, refuse_others, upload

Results = Mapping[str, float | str]


def save(
    delta: DeltaContents,
    folder: str | PathLike[str],
    format: Written,
    results: Results | None = None,
    repository: str | None = None,
) -> Path:
    """Writes a delta into a folder. Under FSDP2 every process calls it, and the first one writes.

    Raises:
        DeltaError: as `Delta.save` does.
    """
    with one_walk(delta.backbone), collections_paused():
        state = state_to_save(delta)
        sharded = any(map(is_sharded, delta.parameters()))
        if not sharded or is_first():
            write(delta, Path(folder), format, state, results=results, repository=repository)
    if sharded:
        wait_for_all()
    return Path(folder)


def state_to_save(delta: DeltaContents, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a delta's file, after all checks that do not need the folder.

    Args:
        given: the state dict of the backbone, if an engine has gathered it in this process alone.

    Raises:
        StateError: as `Delta.save` does.
    """
    attachment = delta._attachment
    refuse_scaled(attachment.record)
    held_of(attachment)
    refuse_changed(attachment, "saving")
    state = delta.state_dict() if given is None else tensors.state_of(attachment, given)
    tensors.refuse_absent(state)
    tensors.refuse_not_finite(attachment, state)
    warn_untrained(attachment, state)
    warn_unfinished(attachment)
    # They are gathered here, because under FSDP2 only the first process goes on.
    return {**state, **extra_tensors(attachment.record.extras)}


def push(delta: DeltaContents, repo_id: str, format: Written, results: Results | None, **options: Any) -> str:
    """Uploads a delta and returns the URL of the repository; `options` are those of `upload`.

    Raises:
        DeltaError: as `Delta.push` does.
    """
    with TemporaryDirectory() as folder:
        return upload(save(delta, folder, format, results, repo_id), repo_id, **options)


def write(
    delta: DeltaContents,
    folder: Path,
    format: Written,
    state: Mapping[str, Tensor],
    *,
    results: Results | None = None,
    repository: str | None = None,
) -> None:
    """Writes the files of a delta, with these tensors.

    Raises:
        CheckpointError: if the format has no such delta, the folder has one of another format, or it cannot be written.
    """
    refuse_others(folder, format)
    attachment = delta._attachment
    sizes, count, names = [0] * len(attachment.record.methods), delta.num_parameters, sorted(state)
    for site in attachment.sites:
        trained = sum(p.numel() for _, p, _ in site.module.trained_parameters())
        size = _computed(attachment, site, state, names) if site.module.computes_saved_state() else trained
        sizes[site.method] += size
        count += size - trained
    details = CardDetails(
        format, sizes, repository, type(delta.backbone).__module__.split(".")[0] == "transformers", results
    )
    config = delta_config(attachment, count)
    card = model_card(config, details)
    if format != "deltakit" and repository is None:
        # Other libraries load the backbone by this name. On the Hub, that of a folder would say nothing.
        config["backbone"]["id"] = loaded_from(delta.backbone)
    written = (
        (attachment, state)
        if format == "deltakit"
        else as_loras(attachment, _without_extras(attachment, state, format))
    )
    WRITERS[format](folder, *written, config, card)


def _without_extras(attachment: Attachment, state: Mapping[str, Tensor], format: Written) -> Mapping[str, Tensor]:
    extras = attachment.record.extras
    if extras:
        warn(
            f"delta {attachment.record.name!r}: files of {format} cannot hold its {' and '.join(extras)}; save it in "
            "deltakit's own format, too"
        )
    return {name: tensor for name, tensor in state.items() if not is_extra(name, extras)}


def _computed(attachment: Attachment, site: Site, state: Mapping[str, Tensor], names: Sequence[str]) -> int:
    """Returns the number of values in a file of a delta module that saves what its parameters compute.

    Args:
        names: those of the tensors, sorted.
    """
    prefix = attachment.named(site, "")
    # Those of one module stand together, and there may be thousands of modules.
    numbers = range(bisect_left(names, prefix), len(names))
    own = takewhile(lambda number: names[number].startswith(prefix), numbers)
    return sum(state[names[number]].numel() for number in own)
