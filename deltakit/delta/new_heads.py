"""Warns of a new head that freezing would leave with its random weights."""

from collections.abc import Collection
from typing import Any

from torch import nn

from deltakit.core import is_quantized, own_parameters, parent_of, records_of
from deltakit.delta.full_training import full_training_names
from deltakit.errors import DeltaError, warn
from deltakit.selection import BackboneIndex


def warn_frozen_head(index: BackboneIndex, trained: Collection[str]) -> None:
    """Warns if freezing would freeze a head of a transformers model that has not learned anything yet.

    transformers marks each parameter that it loads from a checkpoint. Where it has marked none, as in a model from a config
    or in a copy, all outside the base model counts as new. A language-model head never does: resizing the vocabulary makes
    a new one.

    Args:
        trained: the names of the backbone's tensors that are fully trained.
    """
    backbone = index.backbone
    found = _new(backbone)
    if not found:
        return
    own = dict(own_parameters(backbone))
    also = {name for record in records_of(backbone) for name in record.fully_trained}
    new = {name for name in found if name not in also and name not in trained and own[name].requires_grad}
    if not new:
        return
    paths = sorted({_topmost(parent_of(name), new, own) for name in new})
    named = ", ".join(path or "the backbone" for path in paths)
    warn(
        f"{named}: new in this {type(backbone).__name__} and frozen: the parameters are outside the pretrained model or newly "
        f"initialised, so they would keep their random values; pass train={_advice(index, paths, new)} to train them fully "
        "and save them with the delta, or train=() if they are trained already"
    )


def _new(backbone: Any) -> set[str]:
    """Returns the names of the head's parameters that are not pretrained, and then also those of the base model."""
    base = getattr(backbone, str(getattr(backbone, "base_model_prefix", "") or "?"), None)
    if not isinstance(base, nn.Module) or not hasattr(backbone, "get_output_embeddings"):
        return set()
    own = {name: parameter for name, parameter in own_parameters(backbone) if not is_quantized(parameter)}
    inside = {id(parameter) for _, parameter in own_parameters(base)}
    text = {id(p) for p in _parameters(backbone.get_output_embeddings())}
    if not any(map(_is_loaded, own.values())):
        return set() if text else {name for name, parameter in own.items() if id(parameter) not in inside}
    # Resizing the vocabulary makes new embeddings of the old ones, without the mark.
    resized = text | {id(p) for p in _parameters(backbone.get_input_embeddings())}
    new = {name for name, parameter in own.items() if not _is_loaded(parameter) and id(parameter) not in resized}
    return new if any(id(own[name]) not in inside for name in new) else set()


def _is_loaded(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [parameter for _, parameter in own_parameters(module)] if module is not None else []


def _topmost(path: str, new: Collection[str], own: Collection[str]) -> str:
    """Returns the path of the largest module around a path whose parameters are all new."""
    while path and all(
        name in new for name in own if name.startswith(f"{parent_of(path)}." if parent_of(path) else "")
    ):
        path = parent_of(path)
    return path


def _advice(index: BackboneIndex, paths: list[str], new: Collection[str]) -> str:
    """Returns the selector that trains these modules and nothing else."""
    try:
        if set(full_training_names(index.backbone, index.select("@head"))) >= set(new):
            return '"@head"'
    except DeltaError:
        pass
    anchored = [path if index.select(path) == [path] else f"^{path}" for path in paths if path]
    return repr(anchored[0] if len(anchored) == 1 else anchored).replace("'", '"')
