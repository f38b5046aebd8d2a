"""Reads AdapterHub's LoRA and IA3."""

import re
from collections.abc import Mapping
from typing import Any, TypedDict

from torch import nn

from deltakit.errors import CheckpointError
from deltakit.files.formats.adapterhub.keys import IN_ADAPTERHUB, by_place
from deltakit.files.formats.adapterhub.places import path_in
from deltakit.files.formats.format import Parts
from deltakit.files.formats.lora import Scale, add_lora
from deltakit.files.formats.source import Source

_ABSENT = {"vera_d": "VeRA", "vera_b": "VeRA"}
_GATE = ("gate.weight", "gate.bias")
_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)")


class _Config(TypedDict, total=False):
    r: int
    alpha: float
    dropout: float
    composition_mode: str
    use_gating: bool


_DEFAULTS = _Config(r=8, alpha=8, dropout=0.0, composition_mode="add", use_gating=False)


def read_loras(source: Source, name: object, config: Mapping[str, Any], parts: Parts) -> None:
    """Adds the LoRAs or scales of an adapter to the parts.

    Raises:
        CheckpointError: if it has options that deltakit does not have, or does not fit.
    """
    options: Any = source.options(_Config, _DEFAULTS, "config")
    _refuse(source, config, options)
    scales, gated = options["composition_mode"] == "scale", options["use_gating"]
    # The library multiplies by the gate instead of the scale.
    alpha = options["r"] if gated or _is_faulty(source.config.get("version")) else options["alpha"]
    names = {"lora_B"} if scales else {"lora_A", "lora_B", *(_GATE if gated else ())}
    for owner, tensors in by_place(source.tensors, "loras", name).items():
        path = path_in(source.backbone, owner)
        module = source.module(path)
        linear = isinstance(module, nn.Linear) or (module is None and source.backbone is None)
        if gated and not tensors.keys() >= {*_GATE}:
            raise CheckpointError(f"{source.folder}: its LoRA at {owner} lacks its gate; save or download it again")
        if tensors.keys() != names or not linear:
            found = "no module" if module is None else f"a {type(module).__name__}"
            raise CheckpointError(
                f"{source.folder}: it has {', '.join(sorted(tensors))} at {owner}, where this backbone has {found}; deltakit "
                "reads LoRA and IA3 of AdapterHub on linear layers"
            )
        if scales:
            parts.add("ia3", {"side": "output"}, path, {"scale": tensors["lora_B"].flatten() * alpha})
            continue
        a, b = tensors["lora_A"], tensors["lora_B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != options["r"] or b.shape[1] != options["r"]:
            raise CheckpointError(
                f"{source.folder}: the factors at {owner} are {tuple(a.shape)} and {tuple(b.shape)}, and its config has "
                f"r={options['r']}; save or download it again"
            )
        gate = {key: tensors[key] for key in _GATE if gated}
        add_lora(source, parts, path, a, b, Scale(alpha, dropout=options["dropout"]), gate=gate)


def _refuse(source: Source, config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    gated_scales = options["use_gating"] and options["composition_mode"] == "scale"
    absent = {**_ABSENT, "use_gating": "gates on scales"} if gated_scales else _ABSENT
    for option, what in absent.items():
        if config.get(option):
            raise CheckpointError(
                f"{source.folder}: this LoRA of AdapterHub has {what} ({option}), which deltakit does not have"
                f"{IN_ADAPTERHUB}"
            )


def _is_faulty(version: object) -> bool:
    """Returns whether the library had no scaling: that of AdapterHub ahead of 1.1.0 (its pull request 770)."""
    found = _VERSION.match(version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) < (1, 1)
