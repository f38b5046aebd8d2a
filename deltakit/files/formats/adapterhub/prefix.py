"""Reads AdapterHub's prefixes: the keys and values that its MLP computes.

Here every query sees the prefix, as in AdapterHub with eager attention, or with an attention mask. With SDPA and without a
mask its causal mask on Llama forgets the length of the prefix, and hides the last tokens from themselves.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from deltakit.errors import CheckpointError, warn
from deltakit.files.formats.adapterhub.keys import IN_ADAPTERHUB, by_place
from deltakit.files.formats.adapterhub.places import path_in
from deltakit.files.formats.format import Parts
from deltakit.files.formats.products import product
from deltakit.files.formats.source import Source

_END = ".pool"
_POOL = f".prefix_tuning{_END}"
_SELF = "self_prefix."


class _Config(TypedDict, total=False):
    prefix_length: int
    leave_out: list[int]
    flat: bool
    non_linearity: str
    use_gating: bool
    shared_gating: bool
    dropout: float


_DEFAULTS = _Config(
    prefix_length=30,
    leave_out=[],
    flat=False,
    non_linearity="tanh",
    use_gating=False,
    shared_gating=True,
    dropout=0.0,
)


def read_prefixes(source: Source, name: object, _config: Mapping[str, Any], parts: Parts) -> None:
    """Adds the prefixes of an adapter to the parts.

    Raises:
        CheckpointError: if it has options that deltakit does not have, or does not fit.
    """
    options: Any = source.options(_Config, _DEFAULTS, "config")
    _refuse(source, options)
    places = by_place(source.tensors, "prefix_tunings", name)
    gates = by_place(source.tensors, "prefix_gates", name)
    # Each layer of the model has the same tensors under its own name.
    layers = [owner for owner in places if owner.endswith(_POOL)]
    layers = [owner for number, owner in enumerate(layers) if number not in options["leave_out"]]
    pool = _pool(places, source)
    other = next((key for key in pool if not key.startswith(_SELF)), None)
    if other is not None or not layers:
        what = f"it has {other}" if other is not None else "no layer has one"
        raise CheckpointError(
            f"{source.folder}: deltakit reads prefixes of self-attention from AdapterHub, and here {what}{IN_ADAPTERHUB}"
        )
    pairs = _keys_and_values(pool, options["prefix_length"], len(layers), source)
    for owner, key, value in zip(layers, pairs[0::2], pairs[1::2], strict=True):
        path = path_in(source.backbone, owner.removesuffix(_POOL))
        heads = _heads(source, path, key)
        gate = _gate(gates, owner, source) if options["use_gating"] else {}
        parts.add(
            "prefix",
            {"tokens": options["prefix_length"], **({"gate": True} if gate else {})},
            path,
            {
                "key": key.unflatten(1, (heads, -1)).transpose(0, 1),
                "value": value.unflatten(1, (heads, -1)).transpose(0, 1),
                **gate,
            },
        )


def _gate(gates: Mapping[str, Mapping[str, Tensor]], owner: str, source: Source) -> dict[str, Tensor]:
    """Returns the two tensors of the gate of one prefix, by their names in deltakit."""
    gate = gates.get(owner.removesuffix(_END), {})
    if gate.keys() != {"weight", "bias"}:
        raise CheckpointError(f"{source.folder}: its prefix at {owner} lacks its gate; save or download it again")
    return {f"gate.{part}": tensor for part, tensor in gate.items()}


def _refuse(source: Source, options: Mapping[str, Any]) -> None:
    """Refuses prefixes that deltakit does not have, and warns of their dropout."""
    what = ""
    if options["use_gating"] and not options["shared_gating"]:
        what = "a gate for keys and another one for values (shared_gating)"
    elif options["non_linearity"].lower() != "tanh":
        what = f"the activation {options['non_linearity']!r}"
    if what:
        raise CheckpointError(
            f"{source.folder}: this prefix of AdapterHub has {what}, which deltakit does not have{IN_ADAPTERHUB}"
        )
    if options["dropout"] and source.backbone is not None:
        warn(
            f"{source.folder}: it was trained with a dropout of {options['dropout']:g} on the prefix, which deltakit does "
            "not have: outputs are the same, and training goes on without it"
        )


def _pool(places: Mapping[str, Mapping[str, Tensor]], source: Source) -> Mapping[str, Tensor]:
    """Returns the tensors that all layers have."""
    pool = next(iter(places.values()), {})
    shapes = {key: tensor.shape for key, tensor in pool.items()}
    for owner, copy in places.items():
        if {key: tensor.shape for key, tensor in copy.items()} != shapes:
            raise CheckpointError(
                f"{source.folder}: the tensors of its prefix at {owner} have other shapes than those of the first layer; save "
                "or download it again"
            )
    return pool


def _keys_and_values(pool: Mapping[str, Tensor], tokens: int, layers: int, source: Source) -> tuple[Tensor, ...]:
    """Returns the keys and values [tokens, d] of all layers, in turn: the key and the value of the first, and so on."""
    part = {key.removeprefix(_SELF): tensor for key, tensor in pool.items()}
    try:
        if "control_trans" in part:
            both = part["control_trans"]
        else:
            hidden = product(part["wte.weight"], part["control_trans.0.weight"].mT, source.folder)
            hidden = torch.tanh(hidden + part["control_trans.0.bias"])
            both = product(hidden, part["control_trans.2.weight"].mT, source.folder) + part["control_trans.2.bias"]
        return both.reshape(tokens, 2 * layers, -1).unbind(1)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{source.folder}: the tensors of its prefix do not fit each other ({error}); save or download it again"
        ) from error


def _heads(source: Source, path: str, key: Tensor) -> int:
    """Returns the number of heads of an attention; 1 without a backbone."""
    if source.backbone is None:
        return 1
    config = getattr(source.backbone, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1 or key.shape[1] % heads:
        raise CheckpointError(
            f"{source.folder}: its prefix has {key.shape[1]} features at {path}, which are not those of {heads} heads; load "
            "the backbone that it was trained on"
        )
    return heads
