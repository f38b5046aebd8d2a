"""Writes a delta as an adapter of PEFT: its LoRA, IA3, soft prompt or prefix, and the modules that it trains fully.

`PeftModel.from_pretrained`, transformers' `load_adapter` and servers open it. An adapter of PEFT has one rank and one alpha
where nothing else is said, and some servers read nothing else. So LoRAs that differ are padded with zeros to the largest rank,
and their scales are multiplied into B, which changes no output; of different dropouts the largest is written.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltakit.core import (
    Attachment,
    Site,
    is_conv1d,
    name_of,
    names_by_id,
    own_modules,
    parent_of,
    split_slice,
    tensors_in,
    tensors_of,
)
from deltakit.files.checkpoint import plain_tensors, write_files, write_tensors
from deltakit.files.formats.adapter_config import CONFIG
from deltakit.files.formats.peft.dora import written_magnitudes
from deltakit.files.formats.peft.keys import (
    IA3,
    LORA,
    LORA_OF_EMBEDDINGS,
    PREFIX,
    PREFIX_OF_PROMPTS,
    TENSORS,
    TOKENS,
    TOKENS_OF_LORA,
)
from deltakit.files.formats.peft.layers import adapts, differs, impossible
from deltakit.files.formats.peft.prompt_writer import (
    PREFIXES,
    PROMPTS,
    multitask_options,
    prefix_options,
    prompt_options,
)
from deltakit.files.formats.peft.tokens import METHOD, write_tokens

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


class _Factors(NamedTuple):
    """One LoRA on a module: A [r, d_in] and B [d_out, r] over all of its features, and the method that it is of."""

    a: Tensor
    b: Tensor
    method: Any


def write(
    folder: Path, attachment: Attachment, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: str
) -> None:
    """Writes a delta into a folder as an adapter of PEFT; see `Writer`.

    Raises:
        CheckpointError: if PEFT has no such adapter, or the files cannot be written.
    """
    kind = _kind_of(attachment)
    of_kind = _KINDS[kind]
    options, named = of_kind.options(attachment, tensors)
    if kind == "lora":
        rows = write_tokens(attachment, tensors)
        ((suffix, _),) = TOKENS_OF_LORA.items()
        named |= {f"{path}{suffix}": value for path, (_, value) in rows.items()}
        options["trainable_token_indices"] = {path: list(ids) for path, (ids, _) in rows.items()} or None
    named = {f"{of_kind.prefix}{name}": value for name, value in named.items()}
    full = [name for name in attachment.record.fully_trained if name in tensors]
    modules, biases = _fully_trained(attachment, full)
    targets = {site.owner for site in attachment.sites}
    both = next((module for module in modules if module in targets), None)
    if both is not None:
        raise impossible(attachment, f"it trains {both} in full beside its {kind}")
    if biases and kind != "lora":
        raise impossible(attachment, f"it trains {biases[0]}, and {kind} of PEFT trains no biases")
    if biases:
        options["bias"] = "lora_only" if targets.issuperset(map(parent_of, biases)) else "all"
    for name in full:
        owner = parent_of(name)
        held = f"{owner}.base_layer.{name_of(name)}" if owner in targets else name
        # PEFT puts no wrapper of adapters around a model with a prompt.
        named[f"{of_kind.prefix or PREFIX_OF_PROMPTS}{held}"] = tensors[name]
    model = type(attachment.backbone).__name__
    found = {
        "peft_type": of_kind.peft_type,
        "task_type": next((task for end, task in _TASKS.items() if model.endswith(end)), None),
        **options,
        "modules_to_save": modules or None,
        "base_model_name_or_path": config["backbone"]["id"],
        "inference_mode": True,
    }
    _write(folder, found, plain_tensors(named), card)


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    def fill(own: Path) -> list[str]:
        write_tensors(own / TENSORS, tensors, {"format": "pt"})
        (own / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return [TENSORS, CONFIG]

    write_files(folder, fill, card)


def _kind_of(attachment: Attachment) -> str:
    kinds = sorted({method.name for method in attachment.record.methods})
    if kinds == ["lora", METHOD]:
        return "lora"
    if len(kinds) > 1 or kinds[0] not in _KINDS:
        raise impossible(
            attachment, f"an adapter of PEFT is one of {', '.join(_KINDS)}, and this delta is {' and '.join(kinds)}"
        )
    return kinds[0]


def lora_of(attachment: Attachment, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config of a delta's LoRAs, and their tensors by the names that PEFT has without its prefix.

    Raises:
        CheckpointError: if PEFT has no such LoRA.
    """
    by_path: dict[str, list[_Factors]] = {}
    targets: dict[str, nn.Module] = {}
    names = names_by_id(tensors_of(attachment.backbone))
    for site in attachment.sites:
        if attachment.record.methods[site.method].name != "lora":
            continue
        _refuse_parameters(attachment, site, names)
        _refuse(attachment, site, "lora")
        a, b = (tensors[attachment.named(site, name)] for name in "AB")
        part = getattr(site.module, "feature_slice", None)
        b = part.spread(b.mT).mT if part is not None else b
        by_path.setdefault(site.owner, []).append(_Factors(a, b, attachment.record.methods[site.method]))
        targets[site.owner] = site.target
    every = [one for factors in by_path.values() for one in factors]
    method = every[0].method
    options = {"r": method.r, "lora_alpha": method.alpha, "use_rslora": method.rslora}
    alike = len({(one.method.r, one.method.alpha, one.method.rslora) for one in every}) == 1
    if not alike or len(every) > len(by_path):
        r = max(sum(len(one.a) for one in factors) for factors in by_path.values())
        options = {"r": r, "lora_alpha": r, "use_rslora": False}
        by_path = {path: [_Factors(*_sum(factors, r), method)] for path, factors in by_path.items()}
    found = written_magnitudes(attachment, tensors)
    if found:
        options["use_dora"] = True
    for path, (one,) in by_path.items():
        found |= _named(path, targets[path], one.a, one.b)
    return {
        **options,
        "lora_dropout": max(one.method.dropout for one in every),
        "bias": "none",
        **_targets(attachment, targets),
    }, found


def _sum(factors: Sequence[_Factors], r: int) -> tuple[Tensor, Tensor]:
    """Returns the factors of the sum of several LoRAs, with the scales in B, padded with zeros to a rank."""
    a = torch.cat([one.a for one in factors])
    b = torch.cat([one.b * one.method.scaling for one in factors], 1)
    return F.pad(a, (0, 0, 0, r - len(a))), F.pad(b, (0, r - len(a)))


def _named(path: str, target: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    names = LORA_OF_EMBEDDINGS if isinstance(target, nn.Embedding) else LORA
    kernel = getattr(target, "kernel_size", ())
    if isinstance(target, nn.modules.conv._ConvNd):
        a, b = a.unflatten(1, (-1, *kernel)), b[(..., *([None] * len(kernel)))]
    return {f"{path}{suffix}": {"A": a, "B": b}[ours] for suffix, ours in names.items()}


def _refuse(attachment: Attachment, site: Site, kind: str) -> None:
    if site.module.target_never_called:
        raise impossible(
            attachment, f"the module around {site.path} reads its weight directly, where PEFT has no effect"
        )
    if not adapts(site.target, kind):
        raise impossible(attachment, f"{site.path} is a {type(site.target).__name__}, for which PEFT has no {kind}")
    if kind == "ia3" and site.module.part:
        raise impossible(attachment, f"{site.path} is a part of a module, and IA3 of PEFT scales all of it")
    if kind == "lora" and differs(site.target):
        raise impossible(attachment, f"{site.path} {differs(site.target)}, where PEFT's LoRA computes something else")


def _refuse_parameters(attachment: Attachment, site: Site, names: Mapping[int, Sequence[str]]) -> None:
    parameter = split_slice(site.module.part)[0] if not site.module.part.startswith("[") else ""
    weight = site.target._parameters.get("weight")
    if parameter not in ("", "weight") or weight is None:
        raise impossible(attachment, f"{site.path} is a parameter, and deltakit writes LoRA of modules alone")
    tied = names[id(weight)]
    if parameter and len(tied) > 1:
        raise impossible(attachment, f"{tied[0]} and {tied[1]} are one weight here, and two in PEFT")


def _ia3(attachment: Attachment, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found: dict[str, Tensor] = {}
    inputs, targets = [], {}
    ((suffix, name),) = IA3.items()
    for site in attachment.sites:
        _refuse(attachment, site, "ia3")
        scale, before = tensors[attachment.named(site, name)], type(site.module).acts_before()
        inputs += [site.path] if before else []
        targets[site.path] = site.target
        if isinstance(site.target, nn.modules.conv._ConvNd):
            shape = (1, -1, *([1] * len(site.target.kernel_size)))
        else:
            shape = (1, -1) if before else (-1, 1)
        found[f"{site.path}{suffix}"] = scale.reshape(shape)
    # PEFT takes these names for the ends of paths also within a word.
    others = (path for path in targets if path not in inputs)
    return {**_targets(attachment, targets), "feedforward_modules": _pattern(inputs, others, "")}, found


def _tokens(attachment: Attachment, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    rows = write_tokens(attachment, tensors)
    ids = {ids for ids, _ in rows.values()}
    if len(ids) > 1:
        raise impossible(
            attachment, "its modules have different ids, and TRAINABLE_TOKENS of PEFT has the same for all"
        )
    ((suffix, _),) = TOKENS.items()
    targets = {path: attachment.backbone.get_submodule(path) for path in rows}
    options = {"token_indices": list(*ids), "target_modules": _targets(attachment, targets)["target_modules"]}
    return options, {f"{path}{suffix}": value for path, (_, value) in rows.items()}


def _targets(attachment: Attachment, targets: Mapping[str, nn.Module]) -> dict[str, Any]:
    others = (path for path, _ in own_modules(attachment.backbone) if path not in targets)
    return {
        "target_modules": _pattern(list(targets), others, "."),
        "fan_in_fan_out": all(map(is_conv1d, targets.values())),
    }


def _pattern(names: list[str], others: Iterable[str], before: str) -> list[str] | str:
    """Returns names of modules as a list, which PEFT takes for ends of paths; a pattern if others have the same ends."""
    ends = tuple(before + name for name in names)
    return "|".join(map(re.escape, names)) if any(path.endswith(ends) for path in others) else names


def _fully_trained(attachment: Attachment, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the modules that hold these tensors, and the biases among them that are trained alone.

    PEFT trains modules in full, and biases, and no other single tensors.
    """
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
                raise impossible(attachment, f"it trains {owner}, and PEFT would also take {other}; train both")
        elif [name_of(name) for name in mine] == ["bias"]:
            biases += mine
        elif attachment.record.moved.issuperset(mine):
            raise impossible(
                attachment,
                f"running statistics moved, such as {mine[0]}, and PEFT has no place for them",
            )
        else:
            raise impossible(
                attachment, f"it trains {mine[0]} without {missing[0]}, and PEFT trains whole modules or biases"
            )
    return whole, biases


class _Kind(NamedTuple):
    """How one method is written: PEFT's name of it, what finds options and tensors, and what their names begin with."""

    peft_type: str
    options: Callable[[Attachment, Mapping[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]
    prefix: str = PREFIX


_KINDS = {
    "lora": _Kind("LORA", lora_of),
    "ia3": _Kind("IA3", _ia3),
    METHOD: _Kind("TRAINABLE_TOKENS", _tokens),
    **dict.fromkeys(PROMPTS, _Kind("PROMPT_TUNING", prompt_options, "")),
    "multitask_prompt": _Kind("MULTITASK_PROMPT_TUNING", multitask_options, ""),
    **dict.fromkeys(PREFIXES, _Kind("PREFIX_TUNING", prefix_options, "")),
}
