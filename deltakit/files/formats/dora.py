"""The magnitudes of DoRA. PEFT's and LyCORIS's hold the norms of the weight's rows; deltakit's are what training added."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import (
    FeatureSlice,
    Site,
    Target,
    are_apart,
    bare_weight,
    join,
    weight_view,
    wide,
)
from deltakit.errors import CheckpointError, StateError, TargetError
from deltakit.files.formats.lora import LORA_MAGNITUDES
from deltakit.files.formats.merged import refuse_merged, unknown
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing

_STORES = "DoRA with the norms of"


def read_magnitudes(source: Source, path: str, vector: Tensor) -> Tensor:
    """Returns deltakit's magnitudes [d_out] for those of a file at a module, in any shape.

    Raises:
        CheckpointError: if they do not fit the backbone's weight, or it has no values.
    """
    module, flat = source.module(path), vector.flatten()
    if flat.is_meta or module is None or source.backbone is None:
        # Only names and shapes are wanted, or loading fails because the backbone has no such module.
        return flat
    norms = norms_at(source.backbone, path, module, str(source.folder)).to(flat.device)
    if norms.shape != flat.shape:
        raise CheckpointError(
            f"{source.folder}: {path} has magnitudes of shape {tuple(vector.shape)}, and the backbone's weight has "
            f"{norms.numel()} rows; load it onto the backbone that it was trained on"
        )
    return (wide(flat) - norms).to(flat.dtype)


def written_magnitudes(writing: Writing) -> dict[str, Tensor]:
    """Returns PEFT's magnitudes for the DoRAs of a delta, by the names that PEFT has without its prefix; none without DoRA.

    Raises:
        CheckpointError: if PEFT has no such DoRA, or a weight cannot be read.
    """
    attachment = writing.attachment
    methods: Sequence[Any] = attachment.record.methods
    # Trained tokens may stand beside them.
    sites_of_lora = [site for site in attachment.sites if writing.method(site) == "lora"]
    plain = [site for site in sites_of_lora if not methods[site.method].dora]
    if len(plain) == len(sites_of_lora):
        return {}
    if plain:
        raise writing.impossible(f"{writing.what} has DoRA everywhere or nowhere, and {plain[0].path} has none")
    by_owner: dict[str, list[Site]] = {}
    for site in sites_of_lora:
        earlier = by_owner.setdefault(site.owner, [])
        if not all(are_apart(other.module.part, site.module.part) for other in earlier):
            raise writing.impossible(
                f"it has two DoRAs on the same features of {site.owner}, whose changes do not add up"
            )
        earlier.append(site)
    found: dict[str, Tensor] = {}
    for owner, sites in by_owner.items():
        target, where = sites[0].target, f"delta {attachment.record.name!r} cannot be saved as {writing.what}"
        vector = norms_at(attachment.backbone, owner, target, where)
        for site in sites:
            m = writing.tensor(site, "m")
            part: FeatureSlice | None = getattr(site.module, "feature_slice", None)
            vector = vector.to(m.device) + (m if part is None else part.spread(m))
        if isinstance(target, nn.modules.conv._ConvNd):
            vector = vector.view(1, -1, *[1] * len(target.kernel_size))
        found |= {f"{owner}{suffix}": vector.to(m.dtype) for suffix in LORA_MAGNITUDES}
    return found


def norms_at(backbone: nn.Module, path: str, module: nn.Module, where: str) -> Tensor:
    """Returns the norms [d_out] of the rows of a module's own weight, in float32 or wider.

    Args:
        where: what the error message begins with.

    Raises:
        CheckpointError: if the weight has no values in memory, or not its own because a delta is merged into it.
    """
    view = weight_view(Target(path, module))
    name = join(path, view.name)
    refuse_merged(backbone, [name], where, _STORES)
    try:
        return torch.linalg.vector_norm(wide(bare_weight(module, view)), dim=-1)
    except (StateError, TargetError) as error:
        raise unknown(name, where, _STORES) from error
