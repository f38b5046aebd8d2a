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
    found = tuple(_only_layer(walk, child) for child in roots if names[child] in HEADS) or _last(walk, root, roots)
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


def _only_layer(walk: Walk, path: str) -> str:
    """The only module with parameters in an `nn.Sequential` (torchvision's `heads.head`); else the path itself."""
    if not isinstance(walk.modules[path], nn.Sequential):
        return path
    below = [path, *(other for other in walk.modules if other.startswith(f"{path}."))]
    layers = [other for other in below if any(p is not None for p in walk.modules[other]._parameters.values())]
    return layers[0] if len(layers) == 1 else path


def _last(walk: Walk, root: str, children: Iterable[str]) -> tuple[str, ...]:
    """The last layer of an `nn.Sequential`, if it is a linear layer behind others."""
    children = list(children)
    if not isinstance(walk.modules[root], nn.Sequential) or len(children) < 2:
        return ()
    last = _only_layer(walk, children[-1])
    return (last,) if linear_sizes(walk.modules[last]) else ()
