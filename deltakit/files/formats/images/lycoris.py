"""Reads LyCORIS's LoHa and LoKr. Their files have no config: the shapes of the tensors and an alpha tell all.

The formulas are those of lycoris-lora 4.1.3. A convolution's update may have the Tucker form, with a core [r, r, *kernel].
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.images.keys import LOHA, LOKR
from deltakit.files.formats.layers import differs_with_new_weight
from deltakit.files.formats.products import product
from deltakit.files.formats.source import Source


def read_alpha(tensors: Mapping[str, Tensor], r: int, what: str) -> float:
    """Returns the alpha of a layer of a rank r. In sd-scripts and LyCORIS an alpha of 0 means the rank, as none does.

    Args:
        what: how the error message begins.

    Raises:
        CheckpointError: if it is no number.
    """
    alpha = tensors.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
        raise CheckpointError(f"{what} is no number; save or download it again")
    return (float(alpha) if alpha is not None else 0.0) or float(r)


def update_sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Returns how many inputs and outputs the LoHa or LoKr of a layer has; None without one, or if its tensors do not fit."""
    if LOHA[0] in tensors and LOHA[1] in tensors:
        return _thin_sizes(*(tensors.get(name) for name in ("hada_w1_a", "hada_w1_b", "hada_t1")))
    left = _sizes_of_side(tensors, "lokr_w1", None)
    right = _sizes_of_side(tensors, "lokr_w2", tensors.get("lokr_t2"))
    return (left[0] * right[0], left[1] * right[1]) if left is not None and right is not None else None


def _thin_sizes(b: Tensor | None, a: Tensor | None, core: Tensor | None) -> tuple[int, int] | None:
    if a is None or b is None or min(a.ndim, b.ndim) < 2:
        return None
    if core is None or core.ndim < 3:
        return math.prod(a.shape[1:]), b.shape[0]
    return math.prod(a.shape[1:]) * math.prod(core.shape[2:]), b.shape[1]


def _sizes_of_side(tensors: Mapping[str, Tensor], name: str, core: Tensor | None) -> tuple[int, int] | None:
    whole = tensors.get(name)
    if whole is not None and whole.ndim > 1:
        return math.prod(whole.shape[1:]), whole.shape[0]
    return _thin_sizes(tensors.get(f"{name}_a"), tensors.get(f"{name}_b"), core)


def add_update(source: Source, parts: Parts, path: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Adds the LoHa or LoKr of a layer to the parts.

    Args:
        name: how the file calls the layer, for error messages.

    Raises:
        CheckpointError: if its tensors do not fit each other, or it has a form that deltakit does not have.
    """
    own = {key: tensor for key, tensor in tensors.items() if key in (*LOHA, *LOKR)}
    module = source.module(path)
    why = differs_with_new_weight(module)
    if why:
        raise CheckpointError(
            f"{source.folder}: {path} {why}, where LyCORIS computes something else than deltakit; use it in LyCORIS"
        )
    more = sorted(tensors.keys() - own.keys() - {"alpha", "weight", "bias"})
    fits = all(
        tensor.ndim > (2 if key in (*LOHA[4:], *LOKR[6:]) else 1) and tensor.numel() for key, tensor in own.items()
    )
    if more or not fits or update_sizes(own) is None:
        what = f"it has {more[0]}, which deltakit does not have" if more else "its tensors do not fit each other"
        raise CheckpointError(f"{source.folder}: {name} is a LoHa or LoKr, and {what}; use it in LyCORIS")
    untie = module is not None and source.is_tied(module._parameters.get("weight"))
    method, options, values = _loha(source, own) if LOHA[0] in own else _lokr(source, own, path)
    r = options["r"]
    alpha = read_alpha(tensors, r, f"{source.folder}: the alpha of {name}")
    # Without a factor of rank r LyCORIS takes the scale 1, whatever the alpha is.
    options |= {"alpha": alpha if options.pop("scaled") else float(r), "untie": untie}
    parts.add(method, options, path, values)


def _loha(source: Source, own: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    missing = sorted(set(LOHA[:4]) - own.keys())
    if missing or ("hada_t1" in own) != ("hada_t2" in own):
        raise CheckpointError(f"{source.folder}: it has no {missing[0] if missing else 'two cores'}; save it again")
    values = {"B1": own["hada_w1_a"], "A1": own["hada_w1_b"], "B2": own["hada_w2_a"], "A2": own["hada_w2_b"]}
    tucker = "hada_t1" in own
    if tucker:
        values |= {"core1": own["hada_t1"].flatten(2), "core2": own["hada_t2"].flatten(2)}
    values = {name: value if name.startswith("core") else value.flatten(1) for name, value in values.items()}
    return "loha", {"r": int(own["hada_w1_b"].shape[0]), "tucker": tucker, "scaled": True}, values


def _lokr(source: Source, own: Mapping[str, Tensor], path: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Returns a LoKr. Factors of a rank that deltakit would not use for their size are multiplied."""
    thin = [own[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in own]
    r = int(thin[0].shape[0]) if thin else 1
    sizes = _sizes_of_side(own, "lokr_w1", None)
    assert sizes is not None
    both = "lokr_w1" not in own and r < max(sizes) / 2
    values = (
        {"left_B": own["lokr_w1_a"], "left_A": own["lokr_w1_b"]}
        if both
        else {"left": own["lokr_w1"] if "lokr_w1" in own else _whole(source, own, "lokr_w1")}
    )
    right_sizes = _sizes_of_side(own, "lokr_w2", own.get("lokr_t2"))
    assert right_sizes is not None
    kernel = getattr(source.module(path), "kernel_size", ())
    positions = math.prod(kernel) if isinstance(kernel, tuple) else 1
    full = "lokr_w2" in own or r >= max(right_sizes[0] / positions, right_sizes[1]) / 2
    if full:
        values["right"] = (own["lokr_w2"] if "lokr_w2" in own else _whole(source, own, "lokr_w2")).flatten(1)
    else:
        values |= {"right_B": own["lokr_w2_a"], "right_A": own["lokr_w2_b"]}
        values |= {"core": own["lokr_t2"].flatten(2)} if "lokr_t2" in own else {}
    options = {"r": r, "left": (sizes[1], sizes[0]), "both": both, "full": full, "tucker": "core" in values}
    return "lokr", {**options, "scaled": bool(thin)}, values


def _whole(source: Source, own: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns the product of the factors of one side, as a matrix."""
    b, a, core = own[f"{name}_a"], own[f"{name}_b"].flatten(1), own.get("lokr_t2") if name == "lokr_w2" else None
    if core is None:
        return product(b.flatten(1), a, source.folder)
    # [r, r, positions] times [r, n] and [r, q]: [q, n, positions].
    inner = product(core.flatten(2).movedim(1, -1).flatten(0, 1), a, source.folder)
    inner = inner.unflatten(0, (core.shape[0], -1)).movedim(1, -1).flatten(1)
    return product(b.mT, inner, source.folder)
