"""The row of PEFT's method that changes weights and biases, GLoRA."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltakit.core import Site
from deltakit.errors import CheckpointError
from deltakit.files.formats.layers import Layers
from deltakit.files.formats.peft.row import Field, Row, Stored
from deltakit.files.formats.peft.weight_rows import untied
from deltakit.files.formats.shapes import refuse_integers
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing

_PARTS, _ZEROS = "ABCDE", ".zeros"


def _matrix(tensor: Tensor) -> Tensor:
    # One number for a whole matrix is a vector in PEFT.
    return tensor.reshape(1, 1) if tensor.shape == (1,) else tensor


def _as_theirs(tensor: Tensor, site: Site) -> Tensor:
    module: Any = site.module
    return tensor.flatten() if module.ab == "constant" else tensor


def _differs(module: nn.Module | None) -> str:
    return "" if module is None or type(module) is nn.Linear else f"is a {type(module).__name__}"


def _shape(part: str, layer: nn.Linear) -> tuple[int, ...]:
    """Returns the shape of the zeros that PEFT has for a part that is left out."""
    shapes = {"C": (layer.in_features, 1), "D": (layer.out_features,), "E": (layer.out_features,)}
    return shapes.get(part, (layer.out_features, layer.in_features))


def _zeros(_writing: Writing, sites: Sequence[Site]) -> dict[str, Tensor]:
    """PEFT has a tensor of zeros for each part that is left out."""
    found = {}
    for site in sites:
        layer: Any = site.target
        for part in _PARTS:
            if not any(name == part or name.startswith(f"{part}_") for name in site.module._parameters):
                found[f"{site.path}.glora_{part}{_ZEROS}"] = torch.zeros(_shape(part, layer))
    return found


def _without_zeros(source: Source) -> Source:
    """PEFT uses their values, whatever they are."""
    for name, tensor in source.tensors.items():
        path, _, part = name.removesuffix(_ZEROS).rpartition(".glora_")
        if not name.endswith(_ZEROS) or part not in _PARTS:
            continue
        refuse_integers({name: tensor}, source.folder)
        layer: Any = source.module(path)
        fits = tensor.ndim == (1 if part in "DE" else 2)
        fits = fits and (_differs(layer) != "" or layer is None or tensor.shape == _shape(part, layer))
        if not fits or (not tensor.is_meta and tensor.any()):
            raise CheckpointError(
                f"{source.folder}: {name} should be zeros, where a part is left out, and has other values or another shape; "
                "save or download it again"
            )
    return source


GLORA = Row(
    peft_type="GLORA",
    method="glora",
    tensors={
        **{f".glora_{part}.Xd": Stored(f"{part}_up", optional=True) for part in "ABC"},
        **{f".glora_{part}.Xu": Stored(f"{part}_down", optional=True) for part in "ABC"},
        **{f".glora_{part}.X": Stored(part, _matrix, _as_theirs, optional=True) for part in "AB"},
        **{f".glora_{part}.X": Stored(part, optional=True) for part in "CDE"},
    },
    fields={
        "r": Field("r", int, 8),
        "config_A_B": Field("ab", Literal["lora", "vector", "constant", "none"], "lora"),
        "config_C": Field("c", Literal["lora", "vector", "none"], "lora"),
        "config_D_E": Field("de", Literal["vector", "constant", "none"], "constant"),
    },
    layers=Layers(conv1d=False),
    computed=untied,
    differs=_differs,
    prepared=_without_zeros,
    consumed=tuple(f".glora_{part}{_ZEROS}" for part in _PARTS),
    drawn=_zeros,
)

ROWS = (GLORA,)
