"""Reads the tensors of AdapterHub's compacters: bottlenecks of sums of Kronecker products."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltakit.errors import CheckpointError
from deltakit.files.formats.adapterhub.keys import IN_ADAPTERHUB, by_place
from deltakit.files.formats.products import product
from deltakit.files.formats.source import Source

_LAYERS = {"down": "adapter_down.0.", "up": "adapter_up."}
_KNOWN = re.compile(r"scaling|(adapter_down\.0|adapter_up)\.(W|W_left|W_right|b|phm_rule|phm_rule_left|phm_rule_right)")


def compacter(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: object, source: Source, owner: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the options of a compacter, and its tensors by their names in deltakit.

    Raises:
        CheckpointError: if a tensor is missing, or it has a scaling for each feature.
    """
    strange = next((key for key in tensors if not _KNOWN.fullmatch(key)), None)
    if strange is not None:
        raise CheckpointError(
            f"{source.folder}: its compacter at {owner} also has {strange}, which deltakit does not have{IN_ADAPTERHUB}"
        )
    shared = next(iter(by_place(source.tensors, "shared_parameters", name).values()), {})
    try:
        found = _named(tensors, shared, source.folder)
    except KeyError as error:
        # A compacter that is saved from a model without a head lacks the rule that its layers share.
        raise CheckpointError(
            f"{source.folder}: its compacter at {owner} lacks {error.args[0]}; save it again, from a model with a head"
        ) from error
    factor = tensors.get("scaling", config.get("scaling", 1.0))
    if isinstance(factor, str) or (isinstance(factor, Tensor) and factor.numel() != 1):
        raise CheckpointError(
            f"{source.folder}: its compacter has a scaling per feature, which deltakit does not have{IN_ADAPTERHUB}"
        )
    for last in ("up.right", "up.bias"):
        if last in found:
            found[last] = found[last] * factor
    left, right = found["down.left"], found["down.right"]
    options = {
        "size": len(left) * right.shape[-1],
        "division": len(left),
        "r": left.shape[-1],
        "shared_rule": "shared.rule" in found,
        "bias": "down.bias" in found,
    }
    return options, found


def _named(tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Returns the tensors of a compacter by their names in deltakit.

    Raises:
        KeyError: if one is missing.
    """
    found: dict[str, Tensor] = {}
    for ours, theirs in _LAYERS.items():
        part = {key.removeprefix(theirs): tensor for key, tensor in tensors.items() if key.startswith(theirs)}
        found[f"{ours}.left"], found[f"{ours}.right"] = _factors(part)
        if "b" in part:
            found[f"{ours}.bias"] = part["b"]
        own = _rule(part, where)
        if own is not None:
            found[f"{ours}.own.rule"] = own
    if "down.own.rule" not in found:
        rule = _rule(shared, where)
        if rule is None:
            raise KeyError("phm_rule")
        found["shared.rule"] = rule
    return found


def _factors(part: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the factors [n, d_in/n, r] and [n, r, d_out/n] of the matrices of one layer."""
    if "W" not in part:
        return part["W_left"], part["W_right"]
    # A full matrix is a product with the identity.
    whole = part["W"]
    one = torch.eye(min(whole.shape[1:]), dtype=whole.dtype, device=whole.device).repeat(len(whole), 1, 1)
    return (whole, one) if whole.shape[1] > whole.shape[2] else (one, whole)


def _rule(part: Mapping[str, Tensor], where: Path) -> Tensor | None:
    if "phm_rule_left" in part:
        return product(part["phm_rule_left"], part["phm_rule_right"], where)
    return part.get("phm_rule")
