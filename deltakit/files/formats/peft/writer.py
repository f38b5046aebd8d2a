"""Writes a delta as an adapter of PEFT: its method, and the modules that it trains fully.

`PeftModel.from_pretrained`, transformers' `load_adapter` and servers open it.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deltakit.core import Attachment, name_of, own_modules, parent_of, tensors_in
from deltakit.files.checkpoint import plain_tensors, write_files, write_tensors
from deltakit.files.formats.adapter_config import CONFIG
from deltakit.files.formats.layers import target_options
from deltakit.files.formats.peft.adaption import METHOD as ADAPTION
from deltakit.files.formats.peft.adaption import adaption_options
from deltakit.files.formats.peft.by_table import write_row
from deltakit.files.formats.peft.keys import PREFIX, PREFIX_OF_PROMPTS, TENSORS, TOKENS, TOKENS_OF_LORA
from deltakit.files.formats.peft.ln_tuning import METHOD as NORMS
from deltakit.files.formats.peft.ln_tuning import norms_of
from deltakit.files.formats.peft.lora_writer import BIAS, peft_lora_of
from deltakit.files.formats.peft.prompt_writer import (
    PREFIXES,
    PROMPTS,
    multitask_options,
    prefix_options,
    prompt_options,
)
from deltakit.files.formats.peft.row import Row
from deltakit.files.formats.peft.table import TABLE
from deltakit.files.formats.peft.tokens import METHOD, write_tokens
from deltakit.files.formats.writing import Writing

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def write(
    folder: Path, attachment: Attachment, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: str
) -> None:
    """Writes a delta into a folder as an adapter of PEFT; see `Writer`.

    Raises:
        CheckpointError: if PEFT has no such adapter, or the files cannot be written.
    """
    writing = Writing(attachment, tensors, "PEFT", "an adapter of PEFT")
    kind = _kind_of(writing)
    of_kind = KINDS[kind]
    options, named = of_kind.options(writing)
    if kind == "lora":
        rows = write_tokens(writing)
        ((suffix, _),) = TOKENS_OF_LORA.items()
        named |= {f"{path}{suffix}": value for path, (_, value) in rows.items()}
        options["trainable_token_indices"] = {path: list(ids) for path, (ids, _) in rows.items()} or None
    # What all targets share is in no module of the backbone.
    named = {
        f"{PREFIX_OF_PROMPTS if name in of_kind.shared else of_kind.prefix}{name}": value
        for name, value in named.items()
    }
    full = [name for name in attachment.record.fully_trained if name in tensors]
    modules, biases = _fully_trained(writing, full)
    targets = {site.owner for site in attachment.sites}
    both = next((module for module in modules if module in targets), None)
    if both is not None:
        raise writing.impossible(f"it trains {both} in full beside its {kind}")
    if biases and kind != "lora":
        raise writing.impossible(f"it trains {biases[0]}, and {kind} of PEFT trains no biases")
    if biases:
        options["bias"] = "lora_only" if targets.issuperset(map(parent_of, biases)) else "all"
    for name in full:
        owner = parent_of(name)
        held = f"{owner}.base_layer.{name_of(name)}" if owner in targets else name
        # PEFT puts no wrapper of adapters around a model with a prompt.
        named[f"{of_kind.prefix or PREFIX_OF_PROMPTS}{held}"] = tensors[name]
    found = {
        "peft_type": of_kind.peft_type,
        "task_type": _task(writing, options),
        **options,
        "modules_to_save": modules or None,
        "base_model_name_or_path": config["backbone"]["id"],
        "inference_mode": True,
    }
    _write(folder, found, plain_tensors(named), card)


def _task(writing: Writing, options: Mapping[str, Any]) -> str | None:
    """Returns PEFT's word for what the backbone does, by the name of its class; None if that does not show it."""
    model = type(writing.attachment.backbone).__name__
    task = next((task for end, task in _TASKS.items() if model.endswith(end)), None)
    if options.get("alora_invocation_tokens") and task != "CAUSAL_LM":
        raise writing.impossible(f"PEFT has activated LoRA in causal language models alone, and this is a {model}")
    return task


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    def fill(own: Path) -> list[str]:
        write_tensors(own / TENSORS, tensors, {"format": "pt"})
        (own / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return [TENSORS, CONFIG]

    write_files(folder, fill, card)


def _kind_of(writing: Writing) -> str:
    kinds = sorted({method.name for method in writing.attachment.record.methods})
    if "lora" in kinds and {*kinds} <= {"lora", BIAS, METHOD}:
        return "lora"
    if len(kinds) > 1 or kinds[0] not in KINDS:
        raise writing.impossible(
            f"an adapter of PEFT is one of {', '.join(KINDS)}, and this delta is {' and '.join(kinds)}"
        )
    return kinds[0]


def _tokens(writing: Writing) -> tuple[dict[str, Any], dict[str, Tensor]]:
    rows, backbone = write_tokens(writing), writing.attachment.backbone
    ids = {ids for ids, _ in rows.values()}
    if len(ids) > 1:
        raise writing.impossible("its modules have different ids, and TRAINABLE_TOKENS of PEFT has the same for all")
    ((suffix, _),) = TOKENS.items()
    targets = {path: backbone.get_submodule(path) for path in rows}
    options = {"token_indices": list(*ids), "target_modules": target_options(backbone, targets)["target_modules"]}
    return options, {f"{path}{suffix}": value for path, (_, value) in rows.items()}


def _fully_trained(writing: Writing, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the modules that hold these tensors, and the biases among them that are trained alone.

    PEFT trains modules in full, and biases, and no other single tensors.
    """
    attachment = writing.attachment
    modules = dict(own_modules(attachment.backbone))
    whole, biases = [], []
    owners = dict.fromkeys(map(parent_of, names))
    for owner in owners:
        mine = [name for name in names if parent_of(name) == owner]
        missing = [name for name, _ in tensors_in(owner, modules[owner]) if name not in mine]
        if not missing:
            whole.append(owner)
            other = next((path for path in modules if path.endswith(owner) and path not in owners), None)
            if other is not None:
                raise writing.impossible(f"it trains {owner}, and PEFT would also take {other}; train both")
        elif [name_of(name) for name in mine] == ["bias"]:
            biases += mine
        elif attachment.record.moved.issuperset(mine):
            raise writing.impossible(f"running statistics moved, such as {mine[0]}, and PEFT has no place for them")
        else:
            raise writing.impossible(
                f"it trains {mine[0]} without {missing[0]}, and PEFT trains whole modules or biases"
            )
    return whole, biases


class _Kind(NamedTuple):
    """How one method is written: PEFT's name of it, what finds options and tensors, and what their names begin with."""

    peft_type: str
    options: Callable[[Writing], tuple[dict[str, Any], dict[str, Tensor]]]
    prefix: str = PREFIX
    shared: Collection[str] = ()
    """The names of the tensors that have no path."""


def by_row(row: Row) -> _Kind:
    """Returns how a method in the table is written."""
    return _Kind(row.peft_type, partial(write_row, row), shared=(*row.shared, *row.consumed))


KINDS = {
    "lora": _Kind("LORA", peft_lora_of),
    **{row.method: by_row(row) for row in TABLE},
    NORMS: _Kind("LN_TUNING", norms_of),
    METHOD: _Kind("TRAINABLE_TOKENS", _tokens),
    ADAPTION: _Kind("ADAPTION_PROMPT", adaption_options),
    **dict.fromkeys(PROMPTS, _Kind("PROMPT_TUNING", prompt_options, "")),
    "multitask_prompt": _Kind("MULTITASK_PROMPT_TUNING", multitask_options, ""),
    **dict.fromkeys(PREFIXES, _Kind("PREFIX_TUNING", prefix_options, "")),
}
"""How each method of deltakit is written."""
