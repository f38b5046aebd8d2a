"""Whether the tensors of a delta module fit each other, which is known without a backbone, and whether they are numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deltakit.errors import CheckpointError
from deltakit.files.values import FLOATS

_GATE = {"gate.weight": "1 d_in", "gate.bias": "1"}
_BOTTLENECK = {
    "down.weight": "size d_in",
    "down.bias": "size",
    "up.weight": "d_out size",
    "up.bias": "d_out",
    **_GATE,
}
_SHAPES: Mapping[str, Mapping[str, str]] = {
    "lora": {"A": "... r d_in", "B": "... d_out r", "m": "d_out", **_GATE},
    "ia3": {"scale": "d"},
    "bitfit": {"bias": "d"},
    "adapter": {name: shape.replace("d_in", "d").replace("d_out", "d") for name, shape in _BOTTLENECK.items()},
    "parallel_adapter": _BOTTLENECK,
    "low_rank_adapter": {
        "down.A": "r d",
        "down.B": "size r",
        "down.bias": "size",
        "up.A": "r size",
        "up.B": "d r",
        "up.bias": "d",
        "gate.weight": "1 d",
        "gate.bias": "1",
    },
    "compacter": {
        "down.left": "division d_part r",
        "down.right": "division r size_part",
        "down.bias": "division*size_part",
        "down.own.rule": "division division division",
        "up.left": "division size_part r",
        "up.right": "division r d_part",
        "up.bias": "division*d_part",
        "up.own.rule": "division division division",
        "shared.rule": "division division division",
        "gate.weight": "1 division*d_part",
        "gate.bias": "1",
    },
    "loha": {"A1": "... r d_in", "B1": "... d_out r", "A2": "... r d_in", "B2": "... d_out r"},
    "lokr": {
        "left": "p m",
        "left_B": "p r",
        "left_A": "r m",
        "right": "q n",
        "right_B": "q r",
        "right_A": "r n",
    },
    "gralora": {
        "A": "k r d_in_part",
        "B": "k d_out_part r",
        "A_whole": "hybrid k*d_in_part",
        "B_whole": "k*d_out_part hybrid",
    },
    "glora": {
        **{f"{part}_{side}": shape for part in "AB" for side, shape in (("up", "d_out r"), ("down", "r d_in"))},
        "A": "rows 1",
        "B": "rows 1",
        "C_up": "d_in r",
        "C_down": "r 1",
        "C": "d_in 1",
        "D": "d",
        "E": "d",
    },
    "hira": {"A": "... r d_in", "B": "... d_out r"},
    "delora": {"A": "r d_in", "B": "d_out r", "norms": "d_in", "lam": "1"},
    "vera": {"b": "d_out", "d": "r"},
    "randlora": {"L": "r bases", "G": "bases smaller"},
    "vblora": {
        "logits_A": "r pieces_in vectors",
        "logits_B": "pieces_out r vectors",
        "shared.bank": "vectors length",
    },
    "hra": {"u": "r d"},
    "oft": {"skew": "blocks numbers"},
    "boft": {"R": "factors blocks block_size block_size", "scale": "d_out"},
    "road": {"angle": "k", "scale": "k"},
    "ln_tuning": {"change": "d"},
    "reft": {"rotate": "units r d", "source": "units r d", "bias": "units r"},
    "fourierft": {"spectrum": "n"},
    "waveft": {"spectrum": "n"},
    "c3a": {"kernel": "blocks_out blocks_in block_size"},
    "shira": {"values": "n", "places": "2 n"},
    "prefix": {"key": "heads tokens d", "value": "heads tokens d", **_GATE},
    "llama_adapter": {"prompt": "tokens d", "gate": "1"},
    "soft_prompt": {"prompt": "tokens d"},
    "trainable_tokens": {"rows": "k d"},
}
"""The dimensions of each tensor by its name in the delta module. One name is one size, and that of an option is its value; ...
are any that come first, and a product is one of sizes that stand before it."""

_SIDES_IN_TUCKER_FORM = {
    f"{side}{which}": f"r {size}" for side, size in (("A", "d_in"), ("B", "d_out")) for which in "12"
}
_IN_TUCKER_FORM: Mapping[str, Mapping[str, str]] = {
    "loha": {**_SIDES_IN_TUCKER_FORM, "core1": "r r positions", "core2": "r r positions"},
    "lokr": {**_SHAPES["lokr"], "right_B": "r q", "core": "r r positions"},
}
"""The same for targets with a core for each position in the kernel of a convolution."""


def check_shapes(
    method: str, options: Mapping[str, Any], path: str, tensors: Mapping[str, Tensor], where: Path
) -> None:
    """Checks the shapes of the tensors of one delta module.

    Raises:
        CheckpointError: if they do not fit each other, or the options.
    """
    table = _IN_TUCKER_FORM if any(name.startswith("core") for name in tensors) else _SHAPES
    shapes = {name: shape.split() for name, shape in table.get(method, {}).items() if name in tensors}
    sizes: dict[str, object] = {}
    fits = True
    for name, dimensions in shapes.items():
        found: list[Any] = list(tensors[name].shape)
        if dimensions[0] == "...":
            last = len(dimensions) - 1
            found = [tuple(found[:-last]), *found[-last:]]
        fits = fits and len(found) == len(dimensions)
        for dimension, size in zip(dimensions, found, strict=False):
            fits = fits and size == _expected(dimension, size, options, sizes)
    if not fits:
        given = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in shapes)
        given += "".join(
            f", {name}={options[name]}"
            for name in ("r", "k", "hybrid", "size", "tokens", "division")
            if name in options
        )
        raise CheckpointError(
            f"{where}: the tensors of {method} at {path or 'the backbone'} do not fit each other: {given}; save or download "
            "it again"
        )


def _expected(dimension: str, size: object, options: Mapping[str, Any], sizes: dict[str, object]) -> object:
    if dimension.isdigit():
        return int(dimension)
    if "*" in dimension:
        product: Any = 1
        for factor in dimension.split("*"):
            product *= _expected(factor, 0, options, sizes)
        return product
    value = options.get(dimension)
    return value if isinstance(value, int) else sizes.setdefault(dimension, size)


def refuse_integers(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuses tensors of a delta that are no floating-point numbers: what is computed from them would be.

    Raises:
        CheckpointError: if there is one.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name} has the dtype {tensor.dtype}, and deltas are floating-point numbers of at least 16 bits; "
                "save it again in float32"
            )
