"""Reads PEFT's adapters.

Their keys name every module in full, so the options that chose the modules (`target_modules`, `layers_to_transform`,
`rank_pattern`) are not needed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import regex
import torch
from torch import Tensor

from deltakit.core import join
from deltakit.errors import CheckpointError
from deltakit.files.checkpoint import read_tensors
from deltakit.files.formats.peft.keys import CONFIG, IA3, LORA, LORA_OF_EMBEDDINGS, PICKLE, TENSORS
from deltakit.files.saved import Saved, Trained
from deltakit.files.schema import MethodEntry, checked, read_json

_PREFIX = re.compile(r"^base_model\.(model\.)?")
# PEFT's wrappers around a module, and the copy that it keeps of a module in `modules_to_save`.
_WRAPPER, _COPY = re.compile(r"\.(base_layer|modules_to_save)(?=\.)"), ".original_module."
_LORA = LORA | LORA_OF_EMBEDDINGS

_SECONDS = 2.0
"""The longest that matching one pattern may take. Patterns that people write take microseconds."""

_ABSENT = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "biases of B",
    "target_parameters": "LoRA on parameters",
    "trainable_token_indices": "trained tokens of embeddings",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
"""Options of PEFT's LoRA that change its formula or its targets, and that deltakit does not have."""

_CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which PEFT changes the backbone's weights at the start."""


class _Config(TypedDict, total=False):
    """The fields that are read. PEFT gives those that are absent these defaults."""

    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    alpha_pattern: dict[str, float] | None
    init_lora_weights: bool | str | None
    feedforward_modules: str | list[str] | None


_DEFAULTS = _Config(lora_alpha=8, lora_dropout=0.0, use_rslora=False, alpha_pattern=None, feedforward_modules=None)


def recognises(folder: Path) -> bool:
    """Returns whether a folder holds an adapter of PEFT, or of AdapterHub, whose config has the same name."""
    return (folder / CONFIG).is_file()


def read(folder: Path, own: Mapping[str, Tensor]) -> Saved:
    """Returns the adapter in a folder.

    Args:
        own: the backbone's parameters and saved buffers, under all of their names.

    Raises:
        CheckpointError: if a file is missing or damaged, or the adapter is of a kind that deltakit does not have.
    """
    where = folder / CONFIG
    found = read_json(where.read_bytes(), where)
    kind = found.get("peft_type") if isinstance(found, dict) else None
    if kind not in ("LORA", "IA3"):
        what = f"PEFT's {kind}" if isinstance(kind, str) else "an adapter of AdapterHub"
        raise CheckpointError(f"{folder}: this is {what}, which deltakit does not read; of PEFT it reads LORA and IA3")
    _refuse_absent(found, folder)
    config = _DEFAULTS | checked({key: found[key] for key in _Config.__annotations__ if key in found}, _Config, where)
    tensors = {_PREFIX.sub("", name): tensor for name, tensor in _tensors(folder).items()}
    parts = _parts(tensors, _LORA if kind == "LORA" else IA3)
    if not parts:
        raise CheckpointError(f"{folder}: it has no tensor of a {kind} adapter; save or download it again")
    groups = _lora(parts, config, own, folder) if kind == "LORA" else _ia3(parts, config, folder)
    methods, renamed = _numbered(groups)
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith((*_LORA, *IA3))}
    full = _fully_trained(rest, own, folder)
    return Saved(methods, renamed | full, Trained(names=sorted(full)))


_Parts = dict[str, dict[str, Tensor]]
"""The tensors of an adapter by the path of their target and their name in deltakit."""
_Groups = dict[tuple[tuple[str, Any], ...], _Parts]
"""The parts that have the same options, by these options."""


def _refuse_absent(config: Mapping[str, Any], folder: Path) -> None:
    for option, what in _ABSENT.items():
        if config.get(option):
            raise CheckpointError(
                f"{folder}: this LoRA of PEFT has {what} ({option}), which deltakit does not have; merge it into the backbone "
                "by PEFT's merge_and_unload()"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BACKBONE):
        raise CheckpointError(
            f"{folder}: this LoRA of PEFT started by changing the backbone's weights (init_lora_weights={start!r}), so it "
            "does not fit the plain backbone; save it again by PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion="
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / TENSORS).is_file():
        return read_tensors(folder / TENSORS)
    if not (folder / PICKLE).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        what = f"pass one of its folders {', '.join(inside)}" if inside else "save or download it again"
        raise CheckpointError(f"{folder}: it has {CONFIG}, and neither {TENSORS} nor {PICKLE}; {what}")
    try:
        found = torch.load(folder / PICKLE, map_location="cpu", weights_only=True)
    except Exception as error:
        # A pickle may hold anything; what is no tensor is refused, and not run.
        raise CheckpointError(
            f"{folder / PICKLE} is damaged, or holds more than tensors: {type(error).__name__}; save it again as {TENSORS}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{folder / PICKLE} holds more than tensors; save it again as {TENSORS}")
    return {str(name): tensor for name, tensor in found.items()}


def _parts(tensors: Mapping[str, Tensor], suffixes: Mapping[str, str]) -> _Parts:
    found: _Parts = {}
    for name, tensor in tensors.items():
        for suffix, ours in suffixes.items():
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix), {})[ours] = tensor
    return found


def _lora(parts: _Parts, config: _Config, own: Mapping[str, Tensor], folder: Path) -> _Groups:
    groups: _Groups = {}
    for path, pair in parts.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(
                f"{folder}: {path} has one factor of LoRA without the other; save or download it again"
            )
        # Of convolutions, A [r, in, *kernel] and B [out, r, 1, ...]; ours are matrices.
        a, b = (tensor.flatten(1) for tensor in (pair["A"], pair["B"]))
        weight = own.get(join(path, "weight"))
        options = {
            "r": a.shape[0],
            "alpha": _matching(config["alpha_pattern"] or {}, path, config["lora_alpha"], folder / CONFIG),
            "rslora": config["use_rslora"],
            "dropout": config["lora_dropout"],
            # PEFT adapts the module alone, also if its weight is tied.
            "untie": sum(weight is other for other in own.values()) > 1 if weight is not None else False,
        }
        groups.setdefault(tuple(options.items()), {})[path] = {"A": a, "B": b}
    return groups


def _ia3(parts: _Parts, config: _Config, folder: Path) -> _Groups:
    groups: _Groups = {}
    for path, part in parts.items():
        side = "input" if _is_chosen(config["feedforward_modules"] or [], path, folder / CONFIG) else "output"
        groups.setdefault((("side", side),), {})[path] = {"scale": part["scale"].flatten()}
    return groups


def _numbered(groups: _Groups) -> tuple[list[MethodEntry], dict[str, Tensor]]:
    """Returns a method for each group of options, and all tensors by their names in deltakit."""
    methods: list[MethodEntry] = []
    tensors: dict[str, Tensor] = {}
    for number, (options, parts) in enumerate(groups.items(), 1):
        name = "lora" if "r" in dict(options) else "ia3"
        label = f"{name}_{number}" if number > 1 else name
        methods.append({"method": name, "targets": list(parts), **dict(options)})  # type: ignore[typeddict-item]
        tensors |= {f"{join(path, label)}.{key}": value for path, part in parts.items() for key, value in part.items()}
    return methods, tensors


def _matching(patterns: Mapping[str, float], path: str, default: float, where: Path) -> float:
    """Returns the value of the first pattern that matches the end of a path, as PEFT matches them."""
    found = (value for key, value in patterns.items() if _matches(rf"(.*\.)?({key})$", path, where / "alpha_pattern"))
    return next(found, default)


def _is_chosen(modules: str | Sequence[str], path: str, where: Path) -> bool:
    """Returns whether PEFT's options choose a module: a text is a regular expression, a list has ends of paths."""
    if isinstance(modules, str):
        return _matches(f"({modules})$", path, where / "feedforward_modules")
    return any(path == name or path.endswith(f".{name}") for name in modules)


def _matches(pattern: str, path: str, where: Path) -> bool:
    # Python's own `re` cannot be stopped, and a pattern in somebody else's file may take years: (a+)+$.
    try:
        return regex.match(pattern, path, timeout=_SECONDS) is not None
    except (regex.error, TimeoutError) as error:
        why = f"is no regular expression ({error})" if isinstance(error, regex.error) else "takes too long to match"
        raise CheckpointError(f"{where}: a pattern {why}; save or download it again") from error


def _fully_trained(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Returns the tensors that replace the backbone's: modules in `modules_to_save`, and biases."""
    found: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = _WRAPPER.sub("", full)
        held = own.get(name)
        if held is None and _COPY not in full:
            raise CheckpointError(
                f"{folder}: {full} is in no module of this backbone, and no part of LoRA or IA3 that deltakit has; load the "
                "backbone that the adapter was trained on"
            )
        # PEFT saves an embedding that LoRA adapts whole, because it may have been resized.
        if held is not None and not (".base_layer." in full and torch.equal(held.cpu(), tensor.to(held.dtype))):
            found[name] = tensor
    for name in found:
        tied = [other for other, tensor in own.items() if tensor is own[name] and other not in found]
        if tied:
            raise CheckpointError(
                f"{folder}: it has {name} trained in full, and in this backbone that is tied to {tied[0]}, which would "
                "change, too; untie the two first"
            )
    return found
