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

_ABSENT = {"use_gating": "gates", "vera_d": "VeRA", "vera_b": "VeRA"}
_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)")


class _Config(TypedDict, total=False):
    r: int
    alpha: float
    dropout: float
    composition_mode: str


_DEFAULTS = _Config(r=8, alpha=8, dropout=0.0, composition_mode="add")


def read_loras(source: Source, name: object, config: Mapping[str, Any], parts: Parts) -> None:
    """Adds the LoRAs or scales of an adapter to the parts.

    Raises:
        CheckpointError: if it has options that deltakit does not have, or does not fit.
    """
    for option, what in _ABSENT.items():
        if config.get(option):
            raise CheckpointError(
                f"{source.folder}: this LoRA of AdapterHub has {what} ({option}), which deltakit does not have"
                f"{IN_ADAPTERHUB}"
            )
    options: Any = source.options(_Config, _DEFAULTS, "config")
    scales = options["composition_mode"] == "scale"
    alpha = options["r"] if _is_faulty(source.config.get("version")) else options["alpha"]
    for owner, tensors in by_place(source.tensors, "loras", name).items():
        path = path_in(source.backbone, owner)
        module = source.module(path)
        linear = isinstance(module, nn.Linear) or (module is None and source.backbone is None)
        if tensors.keys() != ({"lora_B"} if scales else {"lora_A", "lora_B"}) or not linear:
            found = "no module" if module is None else f"a {type(module).__name__}"
            raise CheckpointError(
                f"{source.folder}: it has {', '.join(sorted(tensors))} at {owner}, where this backbone has {found}; deltakit "
                "reads LoRA and IA3 of AdapterHub on linear layers"
            )
        if scales:
            parts.add("ia3", {"side": "output"}, path, {"scale": tensors["lora_B"].flatten() * alpha})
        else:
            a, b = tensors["lora_A"], tensors["lora_B"]
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != options["r"] or b.shape[1] != options["r"]:
                raise CheckpointError(
                    f"{source.folder}: the factors at {owner} are {tuple(a.shape)} and {tuple(b.shape)}, and its config has "
                    f"r={options['r']}; save or download it again"
                )
            add_lora(source, parts, path, a, b, Scale(alpha, dropout=options["dropout"]))


def _is_faulty(version: object) -> bool:
    """Returns whether the library had no scaling: that of AdapterHub ahead of 1.1.0 (its pull request 770)."""
    found = _VERSION.match(version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) < (1, 1)
