"""Reads AdapterHub's ReFT."""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from deltakit.core import parent_of
from deltakit.errors import CheckpointError, warn
from deltakit.files.formats.adapterhub.keys import IN_ADAPTERHUB, by_place
from deltakit.files.formats.adapterhub.places import path_in
from deltakit.files.formats.format import Parts
from deltakit.files.formats.source import Source

_ORIGINAL, _BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"

_NEAR = 1e-3


class _Config(TypedDict, total=False):
    r: int
    prefix_positions: int
    suffix_positions: int
    orthogonality: bool
    tied_weights: bool
    dropout: float


_DEFAULTS = _Config(r=1, prefix_positions=3, suffix_positions=0, orthogonality=True, tied_weights=False, dropout=0.05)


def read_refts(source: Source, name: object, config: Mapping[str, Any], parts: Parts) -> None:
    """Adds the edits of an adapter to the parts.

    Raises:
        CheckpointError: if it has options that deltakit does not have, or does not fit.
    """
    if config.get("non_linearity"):
        raise CheckpointError(
            f"{source.folder}: this ReFT of AdapterHub has an activation (non_linearity), which deltakit does not have"
            f"{IN_ADAPTERHUB}"
        )
    options: Any = source.options(_Config, _DEFAULTS, "config")
    _warn(source, options)
    first, last = options["prefix_positions"], options["suffix_positions"]
    # Without tied weights the file has a unit for each side, also if one of them is not used.
    units = [0] if options["tied_weights"] else [unit for unit, count in enumerate((first, last)) if count]
    method = {
        "r": options["r"],
        "prefix_positions": first,
        "suffix_positions": last,
        "tied": options["tied_weights"],
    }
    for owner, tensors in by_place(source.tensors, "refts", name).items():
        try:
            found = [_unit(tensors, f"units.{unit}.") for unit in units]
            layer = {ours: torch.stack([one[ours] for one in found]) for ours in found[0]}
        except (KeyError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"{source.folder}: its ReFT at {owner} is not what its config says ({error}); save or download it again"
            ) from error
        variant = "loreft" if options["orthogonality"] and _is_orthonormal(layer["rotate"]) else "noreft"
        parts.add("reft", {"variant": variant, **method}, path_in(source.backbone, parent_of(owner)), layer)


def _unit(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    rows = _orthogonal(own[_ORIGINAL], own[_BASE]) if _ORIGINAL in own else own["projection.weight"]
    return {"rotate": rows, "source": own["learned_source.weight"], "bias": own["learned_source.bias"]}


@torch.no_grad()
def _orthogonal(original: Tensor, base: Tensor) -> Tensor:
    """Returns the orthonormal rows [r, d] that torch's parametrization computes from its two tensors."""
    if original.is_meta:
        return original
    layer = nn.utils.skip_init(nn.Linear, original.shape[1], original.shape[0], bias=False, dtype=original.dtype)
    layer.weight.copy_(torch.eye(*original.shape))
    nn.utils.parametrizations.orthogonal(layer)
    layer.load_state_dict({key.removeprefix("projection."): one for key, one in ((_ORIGINAL, original), (_BASE, base))})
    return layer.weight.detach().clone()


def _is_orthonormal(rows: Tensor) -> bool:
    """Returns whether the rows [units, r, d] are orthonormal; weight decay lets torch's parametrization drop some of them.

    Any rows are those of a NoReFT.
    """
    wanted = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return rows.is_meta or bool(((rows @ rows.mT - wanted).abs() < _NEAR).all())


def _warn(source: Source, options: Mapping[str, Any]) -> None:
    if source.backbone is None:
        return
    if options["dropout"]:
        warn(
            f"{source.folder}: it was trained with a dropout of {options['dropout']:g} in the adapters, which deltakit does "
            "not have: outputs are the same, and training goes on without it"
        )
    if not options["orthogonality"]:
        warn(
            f"{source.folder}: AdapterHub's config does not say whether this is a NoReFT or a DiReFT; it is read as a "
            "NoReFT, as AdapterHub reads it, and a DiReFT gives other outputs than in its training"
        )
