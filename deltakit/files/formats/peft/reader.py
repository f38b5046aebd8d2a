"""Reads PEFT's adapters.

Their tensors' names have every module's path in full, so the options that chose the modules (`layers_to_transform`,
`rank_pattern`) are not needed; `target_modules` and `modules_to_save` only show which tensors are missing.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from deltakit.errors import CheckpointError, warn
from deltakit.files.checkpoint import read_tensors
from deltakit.files.formats.adapter_config import CONFIG, is_adapterhub
from deltakit.files.formats.format import Parts
from deltakit.files.formats.peft.adalora import read_adalora
from deltakit.files.formats.peft.adapter import Adapter
from deltakit.files.formats.peft.adaption import read_adaption
from deltakit.files.formats.peft.full import fully_trained
from deltakit.files.formats.peft.ia3 import read_ia3
from deltakit.files.formats.peft.keys import (
    ADALORA,
    ADAPTION,
    IA3,
    KNOWN,
    LORA,
    LORA_BIAS,
    LORA_MAGNITUDES,
    LORA_OF_EMBEDDINGS,
    PICKLE,
    PREFIX,
    PREFIX_OF_PROMPTS,
    PROMPT,
    TASKS,
    TENSORS,
    TOKENS,
    TOKENS_OF_LORA,
)
from deltakit.files.formats.peft.lora import read_lora
from deltakit.files.formats.peft.missing import warn_missing
from deltakit.files.formats.peft.prefix import read_prefix
from deltakit.files.formats.peft.prompt import read_multitask, read_prompt
from deltakit.files.formats.peft.tokens import read_trainable_tokens
from deltakit.files.pickles import read_either
from deltakit.files.saved import Saved, Trained
from deltakit.files.schema import read_json

_PREFIX = r"^base_model\.(model\.)?"


class _Kind(NamedTuple):
    """What reads one kind of adapter, and how the names of its tensors end."""

    read: Callable[[Adapter, Parts], None]
    ends: tuple[str, ...]


KINDS = {
    "LORA": _Kind(read_lora, (*LORA, *LORA_OF_EMBEDDINGS, *LORA_BIAS, *LORA_MAGNITUDES, *TOKENS_OF_LORA)),
    "ADALORA": _Kind(read_adalora, (*ADALORA, *TOKENS_OF_LORA)),
    "ADAPTION_PROMPT": _Kind(read_adaption, tuple(ADAPTION)),
    "IA3": _Kind(read_ia3, tuple(IA3)),
    "TRAINABLE_TOKENS": _Kind(read_trainable_tokens, tuple(TOKENS)),
    "PROMPT_TUNING": _Kind(read_prompt, (PROMPT,)),
    # The network that computed the prompt is not in the file.
    "P_TUNING": _Kind(read_prompt, (PROMPT,)),
    "MULTITASK_PROMPT_TUNING": _Kind(read_multitask, (PROMPT, *TASKS)),
    "PREFIX_TUNING": _Kind(read_prefix, (PROMPT,)),
}
"""What reads each kind of adapter, by its `peft_type`."""


def recognises(place: Path) -> bool:
    """Returns whether a folder holds an adapter of PEFT. The config of AdapterHub's has the same name."""
    return (place / CONFIG).is_file() and not is_adapterhub(place)


def is_alone(place: Path) -> bool:
    """Returns whether a file has the tensors of an adapter, or a folder has them without a config."""
    file = place / TENSORS if place.is_dir() else place
    if file.name in (TENSORS, PICKLE):
        return file.is_file()
    return (
        file.suffix == ".safetensors"
        and file.is_file()
        and any(key.startswith(PREFIX) for key in read_tensors(file, values=False))
    )


def read(place: Path, backbone: nn.Module | None, values: bool) -> Saved:
    """Returns the adapter in a folder; see `Reader`.

    Raises:
        CheckpointError: if a file is missing or damaged, or the adapter is of a kind that deltakit does not have.
    """
    where = place / CONFIG
    config = read_json(where.read_bytes(), where)
    name = config.get("peft_type") if isinstance(config, dict) else None
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None or not isinstance(name, str):
        what = f"PEFT's {name}" if isinstance(name, str) else f"no adapter of PEFT: its {CONFIG} has no peft_type"
        raise CheckpointError(
            f"{place}: this is {what}, which deltakit does not read; of PEFT it reads {', '.join(KINDS)}"
        )
    # PEFT puts no wrapper of adapters around a model with a prompt.
    prefix = f"^{re.escape(PREFIX_OF_PROMPTS)}" if PROMPT in kind.ends else _PREFIX
    tensors = {re.sub(prefix, "", key): tensor for key, tensor in _tensors(place, values).items()}
    adapter, parts = Adapter(place, config, tensors, backbone), Parts()
    kind.read(adapter, parts)
    if not parts:
        raise CheckpointError(f"{place}: it has no tensor of a {name} adapter; save or download it again")
    methods, renamed = parts.named()
    full = fully_trained(adapter, {key: tensor for key, tensor in tensors.items() if not key.endswith(kind.ends)})
    _warn_of_rest(adapter, name, parts, full)
    base, kinds = config.get("base_model_name_or_path"), config.get("auto_mapping")
    base_class = kinds.get("base_model_class") if isinstance(kinds, dict) else None
    trained = Trained(names=sorted(full))
    return Saved(
        methods,
        renamed | full,
        trained,
        parts.in_order,
        base=base if isinstance(base, str) else None,
        base_class=base_class if isinstance(base_class, str) else None,
    )


def _warn_of_rest(adapter: Adapter, kind: str, parts: Parts, full: Mapping[str, Tensor]) -> None:
    """Warns of modules without tensors, and of options that may mean more than is read."""
    if kind in ("LORA", "IA3"):
        warn_missing(adapter, kind.lower(), parts.paths, full)
    unknown = sorted(key for key, value in adapter.config.items() if key not in KNOWN and value)
    if unknown:
        warn(
            f"{adapter.folder}: its config has options that deltakit does not know: {', '.join(unknown[:5])}; if they change "
            "what the adapter computes, outputs differ; compare them with those of PEFT"
        )


def _tensors(folder: Path, values: bool) -> dict[str, Tensor]:
    found = read_either(folder, TENSORS, PICKLE, values=values)
    if found is not None:
        return found
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    what = f"pass one of its folders {', '.join(inside)}" if inside else "save or download it again"
    raise CheckpointError(f"{folder}: it has {CONFIG}, and neither {TENSORS} nor {PICKLE}; {what}")
