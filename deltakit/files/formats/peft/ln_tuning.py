"""Reads and writes PEFT's tuned norms. Its files have their values; deltakit has their differences from the backbone's."""

from typing import Any

from torch import Tensor, nn

from deltakit.core import is_sharded, join, name_of, parent_of, wide
from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.layers import target_options
from deltakit.files.formats.merged import refuse_merged, refuse_unknown
from deltakit.files.formats.shapes import refuse_integers
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing

METHOD, WITHIN = "ln_tuning", ".ln_tuning_layers."
_STORES = "tuned norms with the values of"


def read_ln_tuning(source: Source, parts: Parts) -> None:
    """Adds the norms of an adapter to the parts.

    Raises:
        CheckpointError: if they are no floating-point numbers, the backbone has no such parameter, or its values are not in
            memory.
    """
    for name, value in source.tensors.items():
        path, within, parameter = name.partition(WITHIN)
        if not within:
            continue
        target = join(path, parameter)
        refuse_integers({name: value}, source.folder)
        if source.backbone is not None:
            own = source.own.get(target)
            if own is None or own.shape != value.shape:
                raise CheckpointError(
                    f"{source.folder}: it has {target} of shape {tuple(value.shape)}, and this backbone has "
                    f"{'none' if own is None else tuple(own.shape)} there; load the backbone that the adapter was trained on"
                )
            refuse_unknown(target, own, str(source.folder), _STORES)
            if is_sharded(own):
                raise CheckpointError(
                    f"{source.folder}: {target} is sharded here (FSDP2); load the adapter before that"
                )
            refuse_merged(source.backbone, source.names_of(own), str(source.folder), _STORES)
            if not value.is_meta:
                value = (wide(value) - wide(own.detach()).to(value.device)).to(value.dtype)
        parts.add(METHOD, {}, target, {"change": value})


def norms_of(writing: Writing) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config of a delta of tuned norms, and its tensors by the names that PEFT has without its prefix.

    PEFT holds all parameters of a norm, so those that the delta does not train have the backbone's values.

    Raises:
        CheckpointError: if a delta is merged into a norm.
    """
    where = f"delta {writing.attachment.record.name!r} cannot be saved as {writing.what}"
    targets: dict[str, nn.Module] = {site.owner: site.target for site in writing.attachment.sites}
    for owner, module in targets.items():
        for name, parameter in module.named_parameters(recurse=False):
            refuse_unknown(join(owner, name), parameter, where, _STORES)
    found = {
        f"{owner}{WITHIN}{name}": parameter.detach()
        for owner, module in targets.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    for site in writing.attachment.sites:
        key = f"{parent_of(site.path)}{WITHIN}{name_of(site.path)}"
        refuse_merged(writing.attachment.backbone, [site.path], where, _STORES)
        change = writing.tensor(site, "change")
        found[key] = (wide(found[key]).to(change.device) + wide(change)).to(found[key].dtype)
    return {"target_modules": target_options(writing.attachment.backbone, targets)["target_modules"]}, found
