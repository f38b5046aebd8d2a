"""Reads AdapterHub's adapters."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from deltakit.errors import CheckpointError, warn
from deltakit.files.formats.adapter_config import CONFIG, is_adapterhub
from deltakit.files.formats.adapterhub.bottleneck import BY_PLACE, read_bottlenecks
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


class _Kind(NamedTuple):
    """What holds the adapters of one architecture, also with an option of its config, and what reads them."""

    holders: Mapping[str, str | None]
    read: _Read


# Of a union, LoRAs come first: AdapterHub's act inside of the layers whose output a bottleneck reads. ReFT comes last, behind
# the blocks.
_KINDS = {
    "lora": _Kind({"loras": None}, read_loras),
    "prefix_tuning": _Kind({"prefix_tunings": None, "prefix_gates": "use_gating"}, read_prefixes),
    # A bottleneck has no name. Compacters share their rule.
    "": _Kind({"adapters": None, "shared_parameters": None, "invertible_adapters": "inv_adapter"}, read_bottlenecks),
    "reft": _Kind({"refts": None}, read_refts),
}

_OTHERS = {
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
    members = _members(place, config["config"])
    tensors, name, parts = _tensors(place, values), config.get("name"), Parts(place)
    holders = [
        holder
        for architecture, own in members.items()
        for holder, option in _KINDS[architecture].holders.items()
        if option is None or own.get(option)
    ]
    _refuse_strange(place, tensors, holders, name)
    refuse_integers(tensors, place)
    for architecture, kind in _KINDS.items():
        if architecture in members:
            own = members[architecture]
            source = Source("AdapterHub", place, file, {**config, "config": own}, tensors, backbone)
            kind.read(source, name, own, parts)
    if not parts:
        raise CheckpointError(f"{place}: it has no tensor of the adapter {name!r}; save or download it again")
    _warn_of_others(place, backbone)
    methods, renamed = parts.named()
    base = config.get("model_name")
    by_place = {entry["method"] for entry in methods} & BY_PLACE if backbone is None else ()
    return Saved(methods, renamed, Trained(), by_place=by_place, base=base if isinstance(base, str) and base else None)


def _members(place: Path, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the config of each architecture: of one, or of those in a union (MAM, UniPELT).

    Raises:
        CheckpointError: if deltakit does not read one, or a union has two of one architecture.
    """
    union = config.get("architecture") == "union"
    members = config.get("configs") if union else [config]
    if not isinstance(members, list) or not members or not all(isinstance(one, dict) for one in members):
        raise CheckpointError(f"{place}: its config is a union of nothing; save or download it again")
    found: dict[str, Mapping[str, Any]] = {}
    for one in members:
        architecture = str(one.get("architecture") or "")
        if architecture not in _KINDS:
            what = _OTHERS.get(architecture, f"an adapter of the architecture {architecture!r}")
            raise CheckpointError(
                f"{place}: this is {f'a union with {what}' if union else what} of AdapterHub, which deltakit does not read; "
                "of AdapterHub it reads bottleneck and invertible adapters, compacters, LoRA, IA3, ReFT and prefixes"
            )
        if architecture in found:
            raise CheckpointError(
                f"{place}: this is a union of two {architecture or 'bottleneck'} configs of AdapterHub, whose tensors "
                f"deltakit cannot tell apart{IN_ADAPTERHUB}"
            )
        found[architecture] = one
    return found


def _tensors(folder: Path, values: bool) -> dict[str, Tensor]:
    found = read_either(folder, TENSORS, PICKLE, values=values)
    if found is None:
        raise CheckpointError(
            f"{folder}: it has {CONFIG}, and neither {TENSORS} nor {PICKLE}; save or download it again"
        )
    return found


def _refuse_strange(folder: Path, tensors: Mapping[str, Tensor], kinds: Collection[str], name: object) -> None:
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
