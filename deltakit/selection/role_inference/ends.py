"""Finds the two ends of a backbone: the embedding of its inputs and its output head."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from deltakit.core import above, join, linear_sizes, own_modules, wrapped_layer
from deltakit.selection.role_inference.names import HEADS
from deltakit.selection.role_inference.walk import Walk


def embeddings(walk: Walk) -> tuple[str, ...]:
    """Returns the paths of the input embeddings, as the models say, or else of the largest embedding outside of blocks."""
    said = [told_by(walk.modules[path], "get_input_embeddings") for path in outermost_models(walk.modules)]
    found = {id(_unwrapped(module)) for module in said if isinstance(module, nn.Module)}
    if found:
        return tuple(path for path, module in walk.modules.items() if id(module) in found)
    # Embeddings inside blocks are those of distances (WavLM), not of tokens.
    tables = {
        path: m.num_embeddings
        for path, m in walk.modules.items()
        if isinstance(m, nn.Embedding) and walk.block_around(path) is None
    }
    return (max(tables, key=tables.__getitem__),) if tables else ()


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """Returns the paths of the output heads of a model, without the inference of its other roles."""
    return heads(Walk(model, dict(own_modules(model))))


def heads(walk: Walk, root: str = "") -> tuple[str, ...]:
    """Returns the paths of the output heads of the model at a path, or of the models inside it if it is a wrapper."""
    model = walk.modules[root]
    # transformers' models name the head of language models, timm's name their classifier.
    said = told_by(model, "get_output_embeddings") or told_by(model, "get_classifier")
    if said is not None:
        told = {id(module) for module in (said if isinstance(said, tuple | list) else (said,))}
        return tuple(path for path, m in walk.modules.items() if id(m) in told and _has_parameters(m))
    roots = [child for child in walk.children[root] if _has_parameters(walk.modules[child])]
    names = {child: child[len(join(root, "")) if root else 0 :] for child in roots}
    base = getattr(model, "base_model_prefix", "")
    if base and base in names.values():
        return tuple(child for child in roots if names[child] != base)
    found = tuple(_last_layer(walk, child) for child in roots if names[child] in HEADS) or _last(walk, root, roots)
    if found:
        return found
    # A wrapper: a LightningModule, PeftModel or SentenceTransformer around a model with a head of its own.
    models = outermost_models(walk.modules)
    inner = roots if len(roots) == 1 else [child for child in roots if any(child in above(path) for path in models)]
    return tuple(head for path in inner for head in heads(walk, path))


def outermost_models(modules: Mapping[str, nn.Module], getter: str = "get_input_embeddings") -> list[str]:
    """The paths of the models that have a getter of transformers' models, without those inside another one."""
    found: list[str] = []
    for path, module in modules.items():
        inside = any(not other or path.startswith(f"{other}.") for other in found)
        # Asked of the class: wrappers such as PEFT's pass every name on to the model inside.
        if not inside and hasattr(type(module), getter):
            found.append(path)
    return found


def told_by(module: nn.Module, getter: str) -> Any:
    """What a model's own getter returns; None if it has none, or if it raises."""
    function = getattr(module, getter, None)
    try:
        return function() if callable(function) else None
    except (NotImplementedError, AttributeError, TypeError):
        # transformers' getter raises on models without an input embedding, or with several.
        return None


def _unwrapped(module: nn.Module) -> nn.Module:
    return wrapped_layer(module) or module


def _has_parameters(module: nn.Module) -> bool:
    return any(p is not None for _, m in own_modules(module) for p in m._parameters.values())


def _last_layer(walk: Walk, path: str) -> str:
    """The layer that computes the output of an `nn.Sequential` (VGG's `classifier.6`); the path itself if there is none.

    A class with its own forward is one head, whatever is in it (RoBERTa's has a dense layer and the projection to classes).
    """
    at = path
    while _runs_in_order(walk.modules[at]) or wrapped_layer(walk.modules[at]) is not None:
        # The packed weights of a quantized layer are buffers.
        inside = [p for p in walk.children[at] if walk.linears_below(p) or _has_parameters(walk.modules[p])]
        if not inside:
            return path
        at = inside[-1]
    last = walk.modules[at]
    return at if linear_sizes(last) is not None or isinstance(last, nn.modules.conv._ConvNd) else path


def _runs_in_order(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _last(walk: Walk, root: str, children: Iterable[str]) -> tuple[str, ...]:
    """The last layer of an `nn.Sequential`, if it is a linear layer behind others."""
    children = list(children)
    if not isinstance(walk.modules[root], nn.Sequential) or len(children) < 2:
        return ()
    last = _last_layer(walk, children[-1])
    return (last,) if linear_sizes(walk.modules[last]) else ()
