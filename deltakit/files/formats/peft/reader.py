"""Reads PEFT's adapters.

Their keys name every module in full, so the options that chose the modules (`target_modules`, `layers_to_transform`,
`rank_pattern`) are not needed.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from deltakit.core import is_quantized, join, module_at, tensors_of
from deltakit.errors import CheckpointError
from deltakit.files.checkpoint import read_tensors
from deltakit.files.formats.peft.keys import CONFIG, IA3, LORA, LORA_OF_EMBEDDINGS, PICKLE, TENSORS
from deltakit.files.formats.peft.layers import differs
from deltakit.files.formats.peft.patterns import is_chosen, matching
from deltakit.files.saved import Saved, Trained
from deltakit.files.schema import MethodEntry, checked, read_json

_PREFIX = re.compile(r"^base_model\.(model\.)?")
# PEFT's wrappers around a module, and the copy that it keeps of a module in `modules_to_save`.
# Where a module in it has modules of its own, the adapter's name stands in between.
_WRAPPERS = (
    re.compile(r"\.(base_layer|modules_to_save)(?=\.)"),
    re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)"),
)
_COPY = ".original_module."
_LORA = LORA | LORA_OF_EMBEDDINGS

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


def read(folder: Path, backbone: nn.Module) -> Saved:
    """Returns the adapter in a folder, for a backbone.

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
    groups = _lora(parts, config, backbone, folder) if kind == "LORA" else _ia3(parts, config, folder)
    methods, renamed = _numbered(groups)
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith((*_LORA, *IA3))}
    full = _fully_trained(rest, dict(tensors_of(backbone)), folder)
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
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) and not t.is_meta for t in found.values()):
        raise CheckpointError(f"{folder / PICKLE} holds more than tensors; save it again as {TENSORS}")
    return {str(name): tensor for name, tensor in found.items()}


def _parts(tensors: Mapping[str, Tensor], suffixes: Mapping[str, str]) -> _Parts:
    found: _Parts = {}
    for name, tensor in tensors.items():
        for suffix, ours in suffixes.items():
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix), {})[ours] = tensor
    return found


def _lora(parts: _Parts, config: _Config, backbone: nn.Module, folder: Path) -> _Groups:
    groups: _Groups = {}
    weights = [id(tensor) for _, tensor in tensors_of(backbone)]
    for path, pair in parts.items():
        if pair.keys() != {"A", "B"} or any(tensor.ndim < 2 for tensor in pair.values()):
            raise CheckpointError(f"{folder}: {path} has no two factors of LoRA; save or download it again")
        module = module_at(backbone, path)
        if differs(module):
            raise CheckpointError(
                f"{folder}: {path} {differs(module)}, where PEFT's LoRA computes something else than deltakit's; "
                "merge it by PEFT's merge_and_unload()"
            )
        weight = module._parameters.get("weight") if module is not None else None
        alpha = matching(config["alpha_pattern"] or {}, path, config["lora_alpha"], folder / CONFIG)
        # Of convolutions, A [r, in, *kernel] and B [out, r, 1, ...]; ours are matrices.
        a, b = (tensor.flatten(1) for tensor in (pair["A"], pair["B"]))
        full = a.shape[0]
        a, b = _needed(a, b)
        r, rslora = a.shape[0], config["use_rslora"]
        options = {
            "r": r,
            "alpha": alpha if r == full else alpha * (math.sqrt(r / full) if rslora else r / full),
            "rslora": rslora,
            # PEFT drops no inputs of embeddings: they are ids.
            "dropout": 0.0 if isinstance(module, nn.Embedding) else config["lora_dropout"],
            # PEFT adapts the module alone, also if its weight is tied.
            "untie": weights.count(id(weight)) > 1,
        }
        groups.setdefault(tuple(options.items()), {})[path] = {"A": a, "B": b}
    return groups


def _needed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors with the same product, of a rank that is at most the smaller side of the weight.

    Rows of zeros that were padded are left out. PEFT also allows more rows than the product has.
    """
    if a.shape[0] != b.shape[1] or a.is_meta:
        return a, b
    used = a.any(1) | b.any(0)
    if not used.all():
        used[0] |= not used.any()
        a, b = a[used], b[:, used]
    if a.shape[0] <= min(a.shape[1], b.shape[0]):
        return a, b
    product = (b.double() @ a.double()).to(a.dtype)
    if a.shape[1] <= b.shape[0]:
        return torch.eye(a.shape[1], dtype=a.dtype), product
    return product, torch.eye(b.shape[0], dtype=b.dtype)


def _ia3(parts: _Parts, config: _Config, folder: Path) -> _Groups:
    groups: _Groups = {}
    for path, part in parts.items():
        scale = part["scale"]
        # Scales of a linear layer's input are a row, and those of its output a column; a convolution's shape does not tell.
        before = scale.shape[0] == 1 if scale.ndim == 2 and 1 in scale.shape and scale.numel() > 1 else None
        if before is None:
            before = is_chosen(config["feedforward_modules"] or [], path, folder / CONFIG)
        groups.setdefault((("side", "input" if before else "output"),), {})[path] = {"scale": scale.flatten()}
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


def _fully_trained(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Returns the tensors that replace the backbone's: modules in `modules_to_save`, and biases."""
    found: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = next((name for name in (pattern.sub("", full) for pattern in _WRAPPERS) if name in own), None)
        if name is None and _COPY not in full:
            raise CheckpointError(
                f"{folder}: {full} is in no module of this backbone, and no part of LoRA or IA3 that deltakit has; load the "
                "backbone that the adapter was trained on"
            )
        if name is not None and not (".base_layer." in full and _is_copy(tensor, own[name])):
            found[name] = tensor
    for name, tensor in found.items():
        tied = [other for other, held in own.items() if held is own[name] and other != name]
        apart = next((other for other in tied if other not in found or not torch.equal(found[other], tensor)), None)
        if apart is not None:
            raise CheckpointError(
                f"{folder}: it has {name} trained in full, and in this backbone that is tied to {apart}, which would change, "
                "too; untie the two first"
            )
    return found


def _is_copy(tensor: Tensor, held: Tensor) -> bool:
    """Returns whether a tensor is the backbone's own. PEFT saves an embedding that LoRA adapts, as it may be resized."""
    if is_quantized(held) or held.is_meta:
        # Its values cannot be compared, and nobody trains them.
        return True
    return torch.equal(held.detach().cpu().to(tensor.dtype), tensor)
