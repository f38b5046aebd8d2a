"""Reads OpenDelta's LoRA and its four kinds of adapters."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deltakit.errors import CheckpointError
from deltakit.files.formats.opendelta.found import Found, is_named
from deltakit.files.formats.products import product
from deltakit.selection import BackboneIndex

_LORA = r"(?:lora(?:_\d+)?\.)?lora_([AB])"
_BOTTLENECK = r"(?:_\d+)?\.modulelist\.((?:down|up)_proj\.(?:weight|bias))"
_SAMPLERS = r"(?:_\d+)?\.((?:down|up)_sampler\.\w+)"
"""How the names of the tensors end, behind the path of the module and the name of the adapter."""

_ENDS = (("down_proj.", "down."), ("up_proj.", "up."))


def read_lora(found: Found) -> None:
    """Adds LoRAs: y = y + (alpha / r) B A x."""
    for path, given in found.groups(_LORA).items():
        a, b = (found.tensor(given, name, path) for name in "AB")
        options = {
            "r": len(a),
            "alpha": found.option("lora_alpha", float, 16.0),
            "dropout": found.option("lora_dropout", float, 0.0),
        }
        found.parts.add("lora", options, path, {"A": a, "B": b})


def read_adapter(found: Found) -> None:
    """Adds adapters: h = h + up(f(down(h)))."""
    for path, given in found.groups(f"adapter{_BOTTLENECK}").items():
        tensors = _bottleneck(found, given, path)
        options = {"size": len(tensors["down.weight"]), "activation": found.activation}
        found.parts.add("adapter", options, path, tensors)


def read_parallel_adapter(found: Found) -> None:
    """Adds parallel adapters. Their tensors are at the module whose input they read; their targets are found by the config."""
    groups: dict[tuple[int, int, bool], dict[str, tuple[str, dict[str, Tensor]]]] = {}
    for source, given in found.groups(f"parallel_adapter{_BOTTLENECK}").items():
        part = _bottleneck(found, given, source)
        target, pair = _after(found, source)
        # Each pair of names is a method of its own, in which the nearest source of a target is its own.
        groups.setdefault((len(part["down.weight"]), pair, target == source), {})[target] = (source, part)
    scaling = found.option("scaled", float, 1.0)
    for (size, _, _), by_target in groups.items():
        sources = tuple(source for source, _ in by_target.values())
        options = {"size": size, "activation": found.activation, "scaling": scaling, "source": sources}
        tensors = {target: part for target, (_, part) in by_target.items()}
        found.add("parallel_adapter", options, tensors, small={"size": 1})


def read_low_rank_adapter(found: Found) -> None:
    """Adds low-rank adapters. OpenDelta multiplies the factors element by element, which is a product for rank 1 alone."""
    for path, given in found.groups(f"low_rank_adapter{_SAMPLERS}").items():
        tensors: dict[str, Tensor] = {}
        for ours, theirs in (("down", "down_sampler"), ("up", "up_sampler")):
            left, right = (found.tensor(given, f"{theirs}.{name}", path) for name in ("W_left", "W_right"))
            if left.shape[1:] != (1,) or right.shape[:1] != (1,):
                raise CheckpointError(
                    f"{found.folder}: its low-rank adapters have rank {left.shape[-1]}, for which OpenDelta computes no "
                    "product and saves the first adapter alone; train them again with low_rank_rank=1"
                )
            tensors |= {f"{ours}.A": left.mT, f"{ours}.B": right.mT}
            tensors[f"{ours}.bias"] = found.tensor(given, f"{theirs}.b", path)
        options = {"size": len(tensors["down.bias"]), "activation": found.activation}
        found.parts.add("low_rank_adapter", options, path, tensors)


def read_compacter(found: Found) -> None:
    """Adds compacters. Their rules are one for each layer, and may be products of vectors."""
    for path, given in found.groups(f"compactor{_SAMPLERS}").items():
        tensors: dict[str, Tensor] = {}
        for ours, theirs in (("down", "down_sampler"), ("up", "up_sampler")):
            part = {name.partition(".")[2]: tensor for name, tensor in given.items() if name.startswith(theirs)}
            tensors |= {f"{ours}.{name}": tensor for name, tensor in _phm_layer(found, part, path).items()}
        n, r, width = tensors["down.right"].shape
        biases = {f"{ours}.bias": n * tensors[f"{ours}.right"].shape[2] for ours in ("down", "up")}
        bias = any(name in tensors for name in biases)
        if bias:
            # deltakit has both or none of them.
            tensors |= {name: tensors["down.left"].new_zeros(d) for name, d in biases.items() if name not in tensors}
        options = {"size": n * width, "division": n, "r": r, "shared_rule": False, "bias": bias}
        found.parts.add("compacter", {**options, "activation": found.activation}, path, tensors)


def _phm_layer(found: Found, given: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Returns the tensors of one layer of a compacter by their names in deltakit."""
    if "phm_rule_left" in given:
        rule = product(given["phm_rule_left"], found.tensor(given, "phm_rule_right", path), found.folder)
    else:
        rule = found.tensor(given, "phm_rule", path)
    if "W" in given:
        # A full matrix is its product with the identity of the smaller side.
        full = given["W"]
        n, d_in, d_out = full.shape
        eye = torch.eye(min(d_in, d_out), dtype=full.dtype, device=full.device).expand(n, -1, -1).clone()
        left, right = (eye, full) if d_in < d_out else (full, eye)
    else:
        left, right = (found.tensor(given, name, path) for name in ("W_left", "W_right"))
    tensors = {"left": left, "right": right, "own.rule": rule}
    return {**tensors, "bias": given["b"]} if "b" in given else tensors


def _bottleneck(found: Found, given: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    return {
        f"{ours}{name}": found.tensor(given, f"{theirs}{name}", path)
        for theirs, ours in _ENDS
        for name in ("weight", "bias")
    }


def _after(found: Found, source: str) -> tuple[str, int]:
    """Returns the module to whose output a parallel adapter adds, and which pair of `modified_modules` says so.

    OpenDelta reads them as pairs of names, the second of which is matched after the first. Without a backbone, and without
    such names, it is the source itself, or the last layer of the feed-forward part that starts with it.
    """
    if found.index is None:
        return source, 0
    names = found.names()
    pairs = list(zip(names[::2], names[1::2], strict=False))
    pair = next((number for number, (first, _) in enumerate(pairs) if is_named(source, first)), None)
    if pair is None:
        return _after_by_role(found.index, source), 0
    first, second = pairs[pair]
    if first == second:
        return source, pair
    paths = list(found.index.by_path)
    behind = paths[paths.index(source) + 1 :] if source in paths else []
    target = next((path for path in behind if is_named(path, second)), None)
    if target is None:
        raise CheckpointError(
            f"{found.folder}: it has a parallel adapter from {source} to a module named {second!r} behind it, and this "
            "backbone has none; load the backbone that the delta was trained on"
        )
    return target, pair


def _after_by_role(index: BackboneIndex, source: str) -> str:
    for unit in index.roles.units:
        if unit.kind == "ff" and source in (unit.parts.get(part) for part in ("up", "gate", "gate_up")):
            return unit.parts["down"]
    return source
