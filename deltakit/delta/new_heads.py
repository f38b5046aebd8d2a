"""Warns of a new head that freezing would leave with its random weights."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

from deltakit.core import is_quantized, module_at, own_children, own_parameters, parent_of, records_of
from deltakit.delta.full_training import full_training_names
from deltakit.errors import DeltaError, warn
from deltakit.selection import BackboneIndex, heads_of, outermost_models, told_by


class Spelling(NamedTuple):
    """How an interface writes what is trained fully.

    Args:
        option: the name of the option.
        always: the entries that the option has in any case.
        role: what selects the head, if it is usual there; else "".
        none: what says that nothing more is to be trained, if the interface has words for that; else "".
    """

    option: str = "train"
    always: tuple[str, ...] = ()
    role: str = "@head"
    none: str = "train=()"


TRAIN = Spelling()


def warn_frozen_head(
    index: BackboneIndex,
    trained: Collection[str],
    selectors: Sequence[str],
    spelling: Spelling = TRAIN,
    frozen: Collection[int] | None = None,
) -> None:
    """Warns if freezing would freeze parts of a transformers model that have not learned anything yet.

    transformers marks each parameter that it loads from a checkpoint. Where it has marked none, as in a model from a config
    or in a copy, all outside the base model counts as new. A language-model head never does: resizing the vocabulary makes
    a new one.

    Args:
        trained: the names of the backbone's tensors that are fully trained.
        selectors: what selected them.
        frozen: the ids of the parameters that would be frozen; None for all others.
    """
    backbone = index.backbone
    found = {key for path in outermost_models(index.by_path, _GETTER) for key in _new(index.by_path[path])}
    if not found:
        return
    own = dict(own_parameters(backbone))
    also = {name for record in records_of(backbone) for name in record.fully_trained}.union(trained)
    freezing = found if frozen is None else found.intersection(frozen)
    new = {name for name, p in own.items() if id(p) in freezing and name not in also and p.requires_grad}
    if not new:
        return
    paths = sorted({_topmost(parent_of(name), new, own) for name in new})
    named = ", ".join(path or "the backbone" for path in paths)
    # A user who selects some modules has seen the option, and may have overlooked others.
    otherwise = "" if selectors else spelling.none
    warn(
        f"{named}: new in this {type(backbone).__name__} and frozen: the parameters are outside the pretrained model or newly "
        f"initialised, so they would keep their random values; pass {spelling.option}="
        f"{_advice(index, paths, new, [*spelling.always, *selectors], spelling.role)} to train them fully and save them with "
        f"the delta, or {otherwise or 'call requires_grad_(False) on them first'} if they are trained already"
    )


_GETTER = "get_output_embeddings"


def _new(model: nn.Module) -> set[int]:
    """Returns the ids of a model's parameters that are not pretrained, if its head is among them."""
    own = [parameter for parameter in _parameters(model) if not is_quantized(parameter)]
    text = {id(p) for p in _parameters(told_by(model, _GETTER))}
    base = module_at(model, str(getattr(model, "base_model_prefix", "") or "?"))
    # Some models have the parts of their base model directly inside, and not the base model that the prefix names (T5's and
    # Whisper's classifiers, CLIP's). These parts are models, too.
    parts = [base] if base is not None else [part for _, part in own_children(model) if hasattr(type(part), _GETTER)]
    inside = {id(parameter) for part in parts for parameter in _parameters(part)}
    if any(map(_is_loaded, own)):
        # Resizing the vocabulary makes new embeddings of the old ones, without the mark.
        resized = text | {id(p) for p in _parameters(told_by(model, "get_input_embeddings"))}
        new = {id(parameter) for parameter in own if not _is_loaded(parameter)} - resized
    else:
        new = set() if text else {id(parameter) for parameter in own} - inside
    if new <= inside:
        return set()
    # A base model by itself has no head either: whether its pooler is used is the user's business.
    return new if base is not None or heads_of(model) else set()


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


def _advice(index: BackboneIndex, paths: list[str], new: Collection[str], already: list[str], role: str) -> str:
    """Returns the selectors that train these modules and nothing else, behind those that there are already."""
    selectors = [path if index.select(path) == [path] else f"^{path}" for path in paths if path]
    if role and _trains(index, role, new):
        selectors = [role]
    wanted = [*already, *selectors]
    return repr(wanted[0] if len(wanted) == 1 else wanted).replace("'", '"')


def _trains(index: BackboneIndex, role: str, new: Collection[str]) -> bool:
    try:
        return set(full_training_names(index.backbone, index.select(role))) >= set(new)
    except DeltaError:
        return False
