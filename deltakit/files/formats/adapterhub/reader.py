"""Reads AdapterHub's adapters."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltakit.errors import CheckpointError, warn
from deltakit.files.formats.adapter_config import CONFIG, is_adapterhub
from deltakit.files.formats.adapterhub.bottleneck import read_bottlenecks
from deltakit.files.formats.adapterhub.keys import FUSION, HEAD, IN_ADAPTERHUB, PICKLE, TENSORS, Key
from deltakit.files.formats.adapterhub.lora import read_loras
from deltakit.files.formats.adapterhub.prefix import read_prefixes
from deltakit.files.formats.adapterhub.reft import read_refts
from deltakit.files.formats.format import Parts
from deltakit.files.formats.shapes import refuse_integers
from deltakit.files.formats.source import Source
from deltakit.files.pickles import read_either
from deltakit.files.saved import Saved, Trained
from deltakit.files.schema import read_json

_Read = Callable[[Source, object, Mapping[str, Any], Parts], None]
_KINDS: dict[str, tuple[str, _Read]] = {
    "": ("adapters", read_bottlenecks),
    "lora": ("loras", read_loras),
    "prefix_tuning": ("prefix_tunings", read_prefixes),
    "reft": ("refts", read_refts),
}
"""What holds the adapters of each architecture, and what reads them. A bottleneck has no name."""

_OTHERS = {
    "union": "a union of several methods",
    "prompt_tuning": "prompt tuning",
    "mtl_lora": "a LoRA of several tasks",
}


def recognises(place: Path) -> bool:
    """Returns whether a folder holds an adapter of AdapterHub."""
    file = place / CONFIG
    if not file.is_file():
        return (place / TENSORS).is_file() or (place / PICKLE).is_file()
    return is_adapterhub(place)


def read(place: Path, backbone: nn.Module | None, values: bool) -> Saved:
    """Returns the adapter in a folder; see `Reader`.

    Raises:
        CheckpointError: if a file is missing or damaged, or the adapter is of a kind that deltakit does not have.
    """
    file = place / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{place}: an adapter of AdapterHub has {CONFIG}, and it is missing; download it again")
    config = read_json(file.read_bytes(), file)
    own = config["config"]
    architecture = own.get("architecture") or ""
    if architecture not in _KINDS:
        what = _OTHERS.get(architecture, f"an adapter of the architecture {architecture!r}")
        raise CheckpointError(
            f"{place}: this is {what} of AdapterHub, which deltakit does not read; of AdapterHub it reads bottleneck "
            "adapters, compacters, LoRA, IA3, ReFT and prefixes"
        )
    kind, reads = _KINDS[architecture]
    tensors = _tensors(place, values)
    _refuse_strange(place, tensors, kind, config.get("name"))
    refuse_integers(tensors, place)
    source, parts = Source("AdapterHub", place, file, config, tensors, backbone), Parts(place)
    reads(source, config.get("name"), own, parts)
    if not parts:
        raise CheckpointError(
            f"{place}: it has no tensor of the adapter {config.get('name')!r}; save or download it again"
        )
    _warn_of_others(place, backbone)
    methods, renamed = parts.named()
    base = config.get("model_name")
    by_place = {entry["method"] for entry in methods} if backbone is None and kind == "adapters" else ()
    return Saved(methods, renamed, Trained(), by_place=by_place, base=base if isinstance(base, str) and base else None)


def _tensors(folder: Path, values: bool) -> dict[str, Tensor]:
    found = read_either(folder, TENSORS, PICKLE, values=values)
    if found is None:
        raise CheckpointError(
            f"{folder}: it has {CONFIG}, and neither {TENSORS} nor {PICKLE}; save or download it again"
        )
    return found


def _refuse_strange(folder: Path, tensors: Mapping[str, Tensor], kind: str, name: object) -> None:
    # Compacters share their rule.
    kinds = (kind, "shared_parameters") if kind == "adapters" else (kind,)
    for full in tensors:
        key = Key(full)
        if key.kind not in kinds or key.name != name:
            what = "an invertible adapter" if "invertible" in full else f"no part of the adapter {name!r}"
            raise CheckpointError(f"{folder}: {full} is {what}, which deltakit does not read{IN_ADAPTERHUB}")


def _warn_of_others(folder: Path, backbone: nn.Module | None) -> None:
    for name, what in ((HEAD, "a prediction head"), (FUSION, "an AdapterFusion")):
        if backbone is not None and (folder / name).is_file():
            warn(
                f"{folder}: the adapter was saved with {what} ({name}), which deltakit does not read: it is not loaded"
            )
