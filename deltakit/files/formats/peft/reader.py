"""Reads PEFT's adapters.

Their tensors' names have every module's path in full, so the options that chose the modules (`layers_to_transform`,
`rank_pattern`) are not needed; `target_modules` and `modules_to_save` only show which tensors are missing.
"""

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from deltakit.errors import CheckpointError, warn
from deltakit.files.formats.adapter_config import CONFIG, is_adapterhub
from deltakit.files.formats.format import Parts
from deltakit.files.formats.layers import LAYERS_OF_LORA, Layers
from deltakit.files.formats.lora import LORA, LORA_MAGNITUDES, LORA_OF_EMBEDDINGS
from deltakit.files.formats.peft.adalora import read_adalora
from deltakit.files.formats.peft.adaption import read_adaption
from deltakit.files.formats.peft.by_table import read_row
from deltakit.files.formats.peft.full import fully_trained
from deltakit.files.formats.peft.keys import (
    ADALORA,
    ADAPTION,
    KNOWN,
    LORA_BIAS,
    PICKLE,
    PREFIX,
    PREFIX_OF_PROMPTS,
    PROMPT,
    TASKS,
    TENSORS,
    TOKENS,
    TOKENS_OF_LORA,
)
from deltakit.files.formats.peft.ln_tuning import WITHIN, read_ln_tuning
from deltakit.files.formats.peft.lora import read_lora
from deltakit.files.formats.peft.missing import warn_missing
from deltakit.files.formats.peft.prefix import read_prefix
from deltakit.files.formats.peft.prompt import read_multitask, read_prompt
from deltakit.files.formats.peft.row import Row
from deltakit.files.formats.peft.table import TABLE
from deltakit.files.formats.peft.tokens import read_trainable_tokens
from deltakit.files.formats.source import Source
from deltakit.files.pickles import read_either
from deltakit.files.saved import Saved, Trained
from deltakit.files.schema import read_json
from deltakit.files.tensor_file import read_tensors

_PREFIX = r"^base_model\.(model\.)?"


class _Kind(NamedTuple):
    """What reads one kind of adapter, how the names of its tensors end, and which modules PEFT has it for."""

    read: Callable[[Source, Parts], None]
    ends: tuple[str, ...]
    layers: Layers | None = None
    """None if the config does not name modules, or for other reasons than to adapt them."""
    known: Collection[str] = ()
    """The fields of its config that not all kinds have."""


def by_row(row: Row) -> _Kind:
    """Returns what reads a method in the table."""
    return _Kind(partial(read_row, row), (*row.tensors, *row.consumed), row.layers, row.all_fields)


_OF_LORA = (*LORA, *LORA_OF_EMBEDDINGS, *LORA_BIAS, *LORA_MAGNITUDES, *TOKENS_OF_LORA)
_OF_TASKS = ("num_ranks", "num_tasks", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")
KINDS = {
    "LORA": _Kind(read_lora, _OF_LORA, LAYERS_OF_LORA),
    "ADALORA": _Kind(read_adalora, (*ADALORA, *TOKENS_OF_LORA)),
    **{row.peft_type: by_row(row) for row in TABLE},
    "LN_TUNING": _Kind(read_ln_tuning, (f"{WITHIN}weight", f"{WITHIN}bias")),
    "ADAPTION_PROMPT": _Kind(read_adaption, tuple(ADAPTION), known=("adapter_layers", "adapter_len")),
    "TRAINABLE_TOKENS": _Kind(read_trainable_tokens, tuple(TOKENS)),
    "PROMPT_TUNING": _Kind(read_prompt, (PROMPT,)),
    # The network that computed the prompt is not in the file.
    "P_TUNING": _Kind(read_prompt, (PROMPT,)),
    "MULTITASK_PROMPT_TUNING": _Kind(read_multitask, (PROMPT, *TASKS), known=_OF_TASKS),
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
        if not isinstance(name, str):
            raise CheckpointError(
                f"{place}: its {CONFIG} has no peft_type, so it is not an adapter of PEFT; pass the folder of an adapter"
            )
        raise CheckpointError(f"{place}: this is PEFT's {name}, which deltakit does not read; use it in PEFT")
    # PEFT puts no wrapper of adapters around a model with a prompt.
    prefix = f"^{re.escape(PREFIX_OF_PROMPTS)}" if PROMPT in kind.ends else _PREFIX
    tensors = {re.sub(prefix, "", key): tensor for key, tensor in _tensors(place, values).items()}
    source, parts = Source("PEFT", place, where, config, tensors, backbone), Parts(place)
    kind.read(source, parts)
    if not parts:
        raise CheckpointError(f"{place}: it has no tensor of a {name} adapter; save or download it again")
    methods, renamed = parts.named()
    full = fully_trained(source, {key: tensor for key, tensor in tensors.items() if not key.endswith(kind.ends)})
    _warn_of_rest(source, kind, parts, full)
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


def _warn_of_rest(source: Source, kind: _Kind, parts: Parts, full: Mapping[str, Tensor]) -> None:
    """Warns of modules without tensors, and of options that may mean more than is read."""
    if kind.layers is not None:
        warn_missing(source, kind.layers, parts.paths, full)
    unknown = sorted(key for key, value in source.config.items() if key not in (KNOWN | {*kind.known}) and value)
    if unknown:
        warn(
            f"{source.folder}: its config has options that deltakit does not know: {', '.join(unknown[:5])}; if they change "
            "what the adapter computes, outputs differ; compare them with those of PEFT"
        )


def _tensors(folder: Path, values: bool) -> dict[str, Tensor]:
    found = read_either(folder, TENSORS, PICKLE, values=values)
    if found is not None:
        return found
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    what = f"pass one of its folders {', '.join(inside)}" if inside else "save or download it again"
    raise CheckpointError(f"{folder}: it has {CONFIG}, and neither {TENSORS} nor {PICKLE}; {what}")
