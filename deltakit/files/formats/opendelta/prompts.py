"""Reads OpenDelta's prefixes and soft prompts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltakit.core import METHODS, without_start_values
from deltakit.errors import CheckpointError, DeltaError
from deltakit.files.formats.opendelta.found import Found, is_named
from deltakit.files.formats.products import product

_REPARAM = ("wte.weight", *(f"control_trans.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")))


def read_prefix(found: Found) -> None:
    """Adds prefixes. Those of an MLP are computed once; the MLP is not kept."""
    pairs = {
        path: (found.tensor(given, "past_key", path), found.tensor(given, "past_value", path))
        for path, given in found.groups(r"prefix(?:_\d+)?\.(past_(?:key|value))").items()
    }
    for first, given in found.groups(rf"reparams(?:_\d+)?\.({'|'.join(map(re.escape, _REPARAM))})").items():
        pairs |= _computed(found, first, [found.tensor(given, name, first) for name in _REPARAM])
    shown: dict[tuple[tuple[str, Any], ...], list[dict[str, Tensor]]] = {}
    for path, (key, value) in pairs.items():
        _check_tokens(found, "prefix_token_num", key)
        options = {"tokens": len(key)} | ({"relative_positions": "first_block"} if _of_t5(found, path) else {})
        target, heads = _attention(found, path, options)
        tensors = {name: _by_head(found, tensor, heads) for name, tensor in (("key", key), ("value", value))}
        if found.index is None:
            # Its names are those of what holds the attention, or of the first of all.
            shown.setdefault(tuple(options.items()), []).append(tensors)
        else:
            found.parts.add("prefix", options, target, tensors)
    for options_shown, states in shown.items():
        found.parts.add_in_order("prefix", dict(options_shown), states)


def _check_tokens(found: Found, field: str, vectors: Tensor) -> None:
    tokens = found.option(field, int, len(vectors))
    if vectors.ndim != 2 or tokens != len(vectors):
        raise CheckpointError(
            f"{found.folder}: its vectors have the shape {tuple(vectors.shape)}, and its config has {field}={tokens}; save or "
            "download it again"
        )


def _computed(found: Found, first: str, given: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the keys and values [tokens, d] that an MLP computes, by the path of the module that they are for."""
    embedding, weight, bias, out_weight, out_bias = given
    hidden = torch.tanh(product(embedding, weight.mT, found.folder) + bias)
    vectors = product(hidden, out_weight.mT, found.folder) + out_bias
    paths = _in_order(found, first)
    if not paths or len(out_bias) % (2 * len(paths)):
        raise CheckpointError(
            f"{found.folder}: its prefixes are {len(out_bias)} features together, which do not fit the {len(paths)} attention "
            "modules that its modified_modules mean on this backbone; load the backbone that the delta was trained on"
        )
    by_module = vectors.unflatten(-1, (len(paths), 2, -1)).unbind(1)
    return {path: (part[:, 0], part[:, 1]) for path, part in zip(paths, by_module, strict=True)}


def _in_order(found: Found, first: str) -> list[str]:
    """Returns the modules that have a prefix of one MLP, in the order in which it computes them."""
    if found.index is None:
        return [first]
    names, index = found.names(), found.index
    if names:
        return [path for path in index.by_path if any(is_named(path, name) for name in names)]
    cross = set(index.roles.paths("attn.cross"))
    return [unit.path for unit in index.roles.units if unit.kind == "attn" and unit.path not in cross]


def _of_t5(found: Found, path: str) -> bool:
    """Returns whether a prefix is in T5: there OpenDelta's takes the relative positions from all blocks but the first."""
    module = found.module(path)
    if module is None:
        return "T5" in found.option("backbone_class", str, "")
    return any(hasattr(child, "has_relative_attention_bias") for child in module.modules())


def _attention(found: Found, path: str, options: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the attention at or below a module, and the number of its heads; the module and 1 without a backbone.

    Raises:
        CheckpointError: if the prefix does not fit the module.
    """
    if found.index is None:
        return path, 1
    module = found.module(path)
    if module is None:
        # `load` says which paths the backbone does not have.
        return path, 1
    if path in found.index.roles.paths("attn.cross"):
        # Its outputs on T5 are those of the bare model, and its generation without a cache fails.
        raise CheckpointError(
            f"{found.folder}: it has a prefix at {path}, in attention to the encoder, where OpenDelta's prefixes do not work; "
            "train a Prefix with deltakit instead"
        )
    try:
        method = METHODS["prefix"](**{**options, "tokens": 1})
        (target,) = method.targets(found.index, [found.index.target(path)])
        with without_start_values():
            built: Any = method.build_at(target)
    except (DeltaError, ValueError) as error:
        raise CheckpointError(
            f"{found.folder}: it has a prefix at {path}, and this backbone has no attention there, or several; load the "
            "backbone that the delta was trained on"
        ) from error
    return target.path, int(built.heads.count)


def _by_head(found: Found, vectors: Tensor, heads: int) -> Tensor:
    """Returns vectors [tokens, d] as [heads, tokens, d / heads]."""
    if vectors.shape[-1] % heads:
        raise CheckpointError(
            f"{found.folder}: its prefixes have {vectors.shape[-1]} features, which do not divide into {heads} heads; load "
            "the backbone that the delta was trained on"
        )
    return vectors.unflatten(-1, (heads, -1)).transpose(0, 1)


def read_soft_prompt(found: Found) -> None:
    """Adds a soft prompt. OpenDelta puts it in front of all tokens, [CLS] included, and leaves it in the output."""
    for given in found.groups(r"soft_prompt_layer\.(soft_embeds)").values():
        vectors = given["soft_embeds"]
        _check_tokens(found, "soft_token_num", vectors)
        options = {"tokens": len(vectors), "where": "start", "trim": False}
        if found.index is None:
            found.parts.add_in_order("soft_prompt", options, [{"prompt": vectors}])
            continue
        method: Any = METHODS["soft_prompt"]
        first, *others = (target.path for target in method(**options).targets(found.index, None))
        # Where several embeddings share a weight, the first one holds the vectors.
        tensors = {first: {"prompt": vectors}, **{other: {} for other in others}}
        found.add("soft_prompt", options, tensors, small={"tokens": 1})
