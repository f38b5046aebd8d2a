"""Reads and writes PEFT's trained rows of embeddings. Its files have the rows themselves; deltakit has their differences."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from deltakit.core import (
    METHODS,
    Site,
    WeightView,
    bare_weight,
    embedding_rows,
    join,
    module_at,
    own_modules,
    parent_of,
    tensors_of,
    wide,
)
from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.layers import differs
from deltakit.files.formats.merged import refuse_merged, refuse_unknown
from deltakit.files.formats.peft.keys import TOKENS
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing
from deltakit.selection import BackboneIndex

METHOD, _STORES = "trainable_tokens", "trained tokens with the rows of"
Indices = Sequence[int] | Mapping[str, Sequence[int]] | None
"""The ids of the rows, or those of each module by the end of its path."""


class _Config(TypedDict):
    token_indices: list[int]


def read_trainable_tokens(source: Source, parts: Parts) -> None:
    """Adds the rows of an adapter of PEFT's TRAINABLE_TOKENS to the parts.

    Raises:
        CheckpointError: if the config is damaged, a tensor does not fit, or PEFT computes something else there.
    """
    read_tokens(source, parts, TOKENS, source.options(_Config, {"token_indices": []})["token_indices"])


def read_tokens(source: Source, parts: Parts, suffixes: Mapping[str, str], indices: Indices) -> None:
    """Adds the rows of embeddings to the parts.

    Args:
        suffixes: how the names of their tensors end.
        indices: the ids of the rows, as the config has them.

    Raises:
        CheckpointError: if a tensor does not fit, or PEFT computes something else there.
    """
    found = {path: part["rows"] for path, part in source.by_path(suffixes).items()}
    followed: set[str] = set()
    # The input embedding first: modules that share its weight follow it.
    for path in sorted(found, key=lambda path: not _leads(source.backbone, path)):
        if path in followed:
            continue
        ids = _ids(indices, path)
        if found[path].ndim != 2 or len(set(ids)) != len(found[path]) or len(ids) != len(found[path]) or min(ids) < 0:
            raise CheckpointError(
                f"{source.folder}: the rows of {path} have shape {tuple(found[path].shape)}, and its config has {len(ids)} "
                "ids for them; save or download it again"
            )
        followed |= _add(source, parts, path, found, ids)


def _ids(indices: Indices, path: str) -> Sequence[int]:
    if not isinstance(indices, Mapping):
        return indices or ()
    return next((ids for end, ids in indices.items() if path.endswith(end)), ())


def _add(source: Source, parts: Parts, path: str, found: Mapping[str, Tensor], ids: Sequence[int]) -> set[str]:
    """Adds the rows of one module, and returns the paths of the modules that follow it."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    options: dict[str, Any] = {"ids": tuple(sorted(ids)), "untie": False}
    rows = found[path][order]
    if source.backbone is None:
        parts.add(METHOD, options, path, {"rows": rows})
        return set()
    module = source.module(path)
    if not isinstance(module, nn.Embedding | nn.Linear) or ids[order[-1]] >= len(module.weight):
        raise CheckpointError(
            f"{source.folder}: it has rows of {path}, and this backbone has no embedding or linear layer with so many rows "
            "there; load the backbone that the adapter was trained on"
        )
    owners = _owners(source.backbone, module)
    theirs = [found[other] for other in owners if other in found]
    options["untie"] = len(owners) > 1 and not (
        _leads(source.backbone, path) and all(one.is_meta or one.equal(found[path]) for one in theirs)
    )
    together = [path] if options["untie"] else owners
    for other in together:
        _refuse(source, other)
    refuse_merged(source.backbone, [join(other, "weight") for other in owners], str(source.folder), _STORES)
    if not rows.is_meta:
        refuse_unknown(join(path, "weight"), module.weight, str(source.folder), _STORES)
        rows = (wide(rows) - wide(backbone_rows(module, options["ids"]).to(rows.device))).to(rows.dtype)
    index = BackboneIndex(source.backbone)
    targets = METHODS[METHOD](**options).targets(index, [index.target(path)])
    for number, target in enumerate(targets):
        # The first of several modules holds the rows.
        parts.add(METHOD, options, target.path, {} if number else {"rows": rows})
    return set(together)


def _refuse(source: Source, path: str) -> None:
    why = _differs(source.module(path))
    if why:
        raise CheckpointError(
            f"{source.folder}: {path} {why}, where PEFT's trained tokens compute something else than deltakit's; merge them "
            "by PEFT's merge_and_unload()"
        )


def _differs(module: nn.Module | None) -> str:
    """Returns why PEFT computes something else at a module; "" if it does not."""
    if isinstance(module, nn.Linear):
        return "has a bias, which PEFT leaves out" if module.bias is not None else ""
    return differs(module)


def _leads(backbone: nn.Module | None, path: str) -> bool:
    """Returns whether PEFT lets modules with the same weight follow the one at a path: the input embedding of a tied model."""
    ask = getattr(backbone, "get_input_embeddings", None)
    ties = getattr(getattr(backbone, "config", None), "tie_word_embeddings", False)
    return bool(backbone is not None and ask is not None and ties and ask() is module_at(backbone, path))


def _owners(backbone: nn.Module, module: nn.Module) -> list[str]:
    """Returns the paths of the modules that hold a module's weight."""
    weight = module._parameters.get("weight")
    held = [parent_of(name) for name, tensor in tensors_of(backbone) if tensor is weight]
    return held or [""]


def backbone_rows(module: nn.Module, ids: Sequence[int]) -> Tensor:
    """Returns rows [k, d] of the bare weight of an embedding or of a linear layer."""
    where = torch.tensor(ids)
    if isinstance(module, nn.Embedding):
        return embedding_rows(module, where)
    weight = bare_weight(module, WeightView())
    return weight[where.to(weight.device)]


def write_tokens(writing: Writing) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Returns the ids and the rows [k, d] of each module with trained tokens, by its path.

    Of modules that share a weight it is the input embedding, which the others follow in PEFT.

    Raises:
        CheckpointError: if PEFT would compute something else.
    """
    attachment = writing.attachment
    backbone = attachment.backbone
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    taken: set[str] = set()
    for site in attachment.sites:
        if writing.method(site) != METHOD or site.module.rows is None:
            continue
        owners = _owners(backbone, site.target)
        path = next((other for other in owners if _leads(backbone, other)), site.owner)
        _refuse_writing(writing, site, path, owners, taken)
        taken |= {path, *owners} if len(owners) > 1 else {path}
        where = f"delta {attachment.record.name!r} cannot be saved as {writing.what}"
        refuse_merged(backbone, [join(other, "weight") for other in owners], where, _STORES)
        refuse_unknown(join(site.owner, "weight"), site.target._parameters.get("weight"), where, _STORES)
        ids: tuple[int, ...] = vars(site.module)["tokens"]
        change = writing.tensor(site, "rows")
        rows = wide(backbone_rows(site.target, ids).to(change.device)) + wide(change)
        found[path] = ids, rows.to(change.dtype)
    return found


def _refuse_writing(writing: Writing, site: Site, path: str, owners: Sequence[str], taken: Collection[str]) -> None:
    attachment = writing.attachment
    follow = site.module.covers_ties or bool(site.module.part)
    if len(owners) > 1 and not (follow and _leads(attachment.backbone, path)):
        raise writing.impossible(
            f"{owners[0]} and {owners[1]} share a weight, and PEFT would "
            + ("train rows of one alone" if follow else "train rows of both"),
        )
    others = {other.owner for other in attachment.sites if writing.method(other) != METHOD}
    if others.intersection((site.owner, *owners) if len(owners) > 1 else (site.owner,)):
        raise writing.impossible(f"it has a LoRA and TrainableTokens at {path}, and PEFT has one of them there")
    if site.owner in taken or path in taken:
        raise writing.impossible(f"it has two TrainableTokens at {path}, and PEFT has one")
    for other in owners if len(owners) > 1 else [site.owner]:
        why = _differs(module_at(attachment.backbone, other))
        if why:
            raise writing.impossible(f"{other} {why}, where PEFT computes something else")
    both = next(
        (other for other, _ in own_modules(attachment.backbone) if other != path and other.endswith(path)), None
    )
    if both is not None:
        raise writing.impossible(f"PEFT would take {both} for {path}, too")
