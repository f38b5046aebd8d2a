"""Finds where an adapter of AdapterHub acts in a backbone.

AdapterHub names the place by a module of its own (`attention_adapters`) or by the module around the residual. In models built
like BERT the norm follows the residual, and in those built like Llama it precedes the part.
"""

from typing import NamedTuple

from torch import nn

from deltakit.core import join, module_at, parent_of
from deltakit.errors import CheckpointError


class Place(NamedTuple):
    """The modules around one residual connection."""

    part: str
    """The last layer of the part: its output is added to the residual."""
    source: str
    """A module whose input is the residual, ahead of the part."""
    norm: str | None
    """The norm after the residual is added; None if there is none."""
    total: str | None
    """A module whose output is the residual with the part's output added; None if there is none."""


def path_in(backbone: nn.Module | None, path: str) -> str:
    """Returns the path of a module in a backbone, which may be the model in a file, its base, or one with a head around it.

    A path that is in none of them is returned as it is.
    """
    if backbone is None:
        return path
    prefix = getattr(backbone, "base_model_prefix", "")
    candidates = (path, path.partition(".")[2], join(prefix, path) if isinstance(prefix, str) and prefix else path)
    return next((name for name in candidates if name and module_at(backbone, name) is not None), path)


def place_of(backbone: nn.Module, owner: str, where: object) -> Place:
    """Returns the place of a bottleneck adapter.

    Args:
        owner: the path of the module that holds it in the file.
        where: the folder, for error messages.

    Raises:
        CheckpointError: if the backbone is built like neither of the two.
    """
    head, _, last = owner.rpartition(".")
    if last in ("attention_adapters", "output_adapters"):
        layer = path_in(backbone, head)
        attention = last == "attention_adapters"
        part = "self_attn.o_proj" if attention else "mlp.down_proj"
        source = "input_layernorm" if attention else "post_attention_layernorm"
        found = Place(join(layer, part), join(layer, source), None, None if attention else layer)
    else:
        path = path_in(backbone, owner)
        around = parent_of(path)
        attention = path.endswith("attention.output")
        source = join(around, "self.query" if attention else "intermediate.dense")
        norm = join(path, "LayerNorm")
        found = Place(join(path, "dense"), source, norm, norm)
    missing = next((name for name in found if name is not None and module_at(backbone, name) is None), None)
    if missing is not None:
        raise CheckpointError(
            f"{where}: its adapter at {owner} needs {missing}, which this {type(backbone).__name__} does not have; deltakit "
            "reads such adapters for models built like BERT and like Llama, so load one of these"
        )
    return found
