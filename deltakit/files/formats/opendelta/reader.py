"""Reads a folder that OpenDelta's `save_finetuned` wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.opendelta import adapters, full, prompts
from deltakit.files.formats.opendelta.found import Found
from deltakit.files.pickles import read_pickle
from deltakit.files.saved import Saved, Trained
from deltakit.files.schema import read_json

CONFIG, PICKLE = "config.json", "pytorch_model.bin"


TYPES: dict[str, Callable[[Found], None]] = {
    "lora": adapters.read_lora,
    "adapter": adapters.read_adapter,
    "parallel_adapter": adapters.read_parallel_adapter,
    "low_rank_adapter": adapters.read_low_rank_adapter,
    "compacter": adapters.read_compacter,
    "bitfit": full.read_bitfit,
    "prefix": prompts.read_prefix,
    "soft_prompt": prompts.read_soft_prompt,
}
"""What reads each type of delta, by its `delta_type`."""


def recognises(place: Path) -> bool:
    """Returns whether a folder holds a delta of OpenDelta: models have a `config.json`, too, but no `delta_type` in it."""
    if not (place / CONFIG).is_file():
        return False
    try:
        return "delta_type" in _config(place)
    except CheckpointError:
        return False


def read(place: Path, backbone: nn.Module | None, values: bool) -> Saved:
    """Returns the delta in a folder; see `Reader`.

    Raises:
        CheckpointError: if a file is missing or damaged, or the delta is of a type that deltakit does not have.
    """
    config = _config(place)
    name = config.get("delta_type")
    add = TYPES.get(name) if isinstance(name, str) else None
    if add is None:
        raise CheckpointError(
            f"{place}: this is a delta of OpenDelta of the type {name!r}, which deltakit does not read; it reads "
            f"{', '.join(TYPES)}"
        )
    if not (place / PICKLE).is_file():
        raise CheckpointError(f"{place}: it has {CONFIG} of OpenDelta, and no {PICKLE}; save or download it again")
    tensors = read_pickle(place / PICKLE, values=values)
    found = Found("OpenDelta", place, place / CONFIG, config, tensors, backbone, Parts(place))
    empty = next((key for key, tensor in found.tensors.items() if not tensor.numel()), None)
    if empty is not None:
        # Nothing that is trained has no values, and what is computed from its sizes could take any memory.
        raise CheckpointError(f"{place} is damaged: {empty} has no values; save or download it again")
    add(found)
    if not found.parts:
        raise CheckpointError(
            f"{place}: it has no tensor of a {name} delta. OpenDelta saves such a file if its modified_modules "
            "matched nothing; attach and train it again"
        )
    methods, renamed = found.parts.named()
    trained = full.fully_trained(found)
    base, base_class = (config.get(f"backbone_{key}") for key in ("checkpoint_name", "class"))
    plain: Any = [{key: list(v) if isinstance(v, tuple) else v for key, v in entry.items()} for entry in methods]
    return Saved(
        plain,
        {key: tensor.contiguous() for key, tensor in (renamed | trained).items()},
        Trained(names=sorted(trained)),
        in_order=found.parts.in_order,
        by_place={"parallel_adapter"} if backbone is None and name == "parallel_adapter" else (),
        base=base if isinstance(base, str) and base else None,
        base_class=base_class if isinstance(base_class, str) else None,
    )


def _config(place: Path) -> dict[str, Any]:
    config = read_json((place / CONFIG).read_bytes(), place / CONFIG)
    return config if isinstance(config, dict) else {}
