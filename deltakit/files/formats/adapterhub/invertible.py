"""Reads AdapterHub's invertible adapters.

The map follows the embeddings: in models built like BERT their norm. There the library drops values ahead of the map in
training, and deltakit behind it. The inverse precedes the output embedding, as in the paper (Pfeiffer et al. 2020,
https://arxiv.org/abs/2005.00052, section 3.1) and in the library's own heads. In transformers' heads release 1.2.0 leaves
the inverse out.
"""

from typing import Any, TypedDict

from torch import nn

from deltakit.core import join, linear_sizes, module_at, own_modules
from deltakit.errors import CheckpointError
from deltakit.files.formats.adapterhub.keys import IN_ADAPTERHUB, by_place
from deltakit.files.formats.adapterhub.places import path_in
from deltakit.files.formats.format import Parts
from deltakit.files.formats.source import Source

_NAMES = {
    f"{half}.{number}.{theirs}": f"shared.{half}_{ours}"
    for half in "FG"
    for number, layer in ((0, "down"), (2, "up"))
    for theirs, ours in (("weight", layer), ("bias", f"{layer}_bias"))
}
_EMBEDDINGS = ("embeddings.LayerNorm", "embed_tokens")


class _Config(TypedDict, total=False):
    inv_adapter: str | None
    inv_adapter_reduction_factor: float | None


_DEFAULTS = _Config(inv_adapter=None, inv_adapter_reduction_factor=None)


def read_invertible(source: Source, name: object, activation: str, parts: Parts) -> None:
    """Adds the invertible adapter of a folder to the parts, if it has one.

    Args:
        activation: what deltakit calls its activation.

    Raises:
        CheckpointError: if its kind is one that deltakit does not have, or it does not fit the backbone.
    """
    options: Any = source.options(_Config, _DEFAULTS, "config")
    if not options["inv_adapter"]:
        return
    reduction = options["inv_adapter_reduction_factor"] or 0
    if options["inv_adapter"] != "nice" or reduction < 1 or int(reduction) != reduction:
        raise CheckpointError(
            f"{source.folder}: this adapter of AdapterHub has an invertible adapter with "
            f"inv_adapter={options['inv_adapter']!r} and inv_adapter_reduction_factor={reduction:g}, and deltakit has the "
            f"kind 'nice' with whole factors of at least 1{IN_ADAPTERHUB}"
        )
    places = by_place(source.tensors, "invertible_adapters", name)
    owner, tensors = next(iter(places.items()), ("", {}))
    if len(places) != 1 or tensors.keys() != _NAMES.keys():
        raise CheckpointError(
            f"{source.folder}: the tensors of its invertible adapter are not those of two bottlenecks; save or download it "
            "again"
        )
    found = {ours: tensors[theirs] for theirs, ours in _NAMES.items()}
    method = {"reduction": int(reduction), "activation": activation}
    if source.backbone is None:
        parts.add("invertible_adapter", method, owner, found)
        return
    parts.add("invertible_adapter", method, _embeddings(source, owner), found)
    head = _head(source.backbone)
    if head is not None:
        # It has the same map, which the first of them holds.
        parts.add("invertible_adapter", method, head, {})


def _embeddings(source: Source, owner: str) -> str:
    """Returns the path of the module that returns the embeddings.

    Raises:
        CheckpointError: if the backbone is built like neither BERT nor Llama.
    """
    assert source.backbone is not None
    paths = [path_in(source.backbone, join(owner, name)) for name in _EMBEDDINGS]
    found = next((path for path in paths if module_at(source.backbone, path) is not None), None)
    if found is None:
        raise CheckpointError(
            f"{source.folder}: its invertible adapter needs {' or '.join(paths)}, which this {type(source.backbone).__name__} "
            "does not have; deltakit reads such adapters for models built like BERT and like Llama, so load one of these"
        )
    return found


def _head(backbone: nn.Module) -> str | None:
    """Returns the path of the output embedding; None if there is none."""
    ask: Any = getattr(backbone, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if not isinstance(head, nn.Module) or linear_sizes(head) is None:
        return None
    return next((path for path, module in own_modules(backbone) if module is head), None)
