"""Recognises a backbone by its structure and a few values of its weights.

The structure is that of the model, however a quantizer stores it. Values are compared with a tolerance, so that a backbone in
bfloat16 or float16 still matches, and with a wider one if a quantizer rounded them.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import (
    LogicalParameter,
    class_name,
    is_compute_dtype,
    is_quantized,
    named_logical_parameters,
    own_parameters,
    parent_of,
    weight_entries,
)

# bfloat16 has 8 significant bits, and float16 rounds values below 6e-8 to zero. Both stay within these tolerances.
_RELATIVE, _ABSOLUTE = 2e-2, 1e-6
_TENSORS, _VALUES = 256, 2

# Rounding is measured over all values together: sum((a - b)^2) / sum(a^2 + b^2) was 0.005 for one model in 4 and 32 bits, and
# is about 1 for two models. With 16 pairs it falls below 0.3 for two models once in a thousand times (a correlation of 0.7).
_ROUNDED, _PAIRS = 0.3, 16
_PACKED_TENSORS = 16

# The same value in 32 bits, and of these the types that numpy has.
_WITHIN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)
_OF_NUMPY = _WITHIN_FLOAT32[:2]


def fingerprint(backbone: nn.Module, *, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Returns the fingerprint of a backbone without its deltas.

    It has the class, a hash of all parameters' names and logical shapes, their number, and sampled values by parameter name.
    Of a quantized backbone it also has sampled values of quantized weights ("rounded"), and a hash of the names and shapes as
    they are stored ("packed"). Weights on the meta device have no samples.

    Args:
        leave_out: the names of parameters whose values are omitted, because training changed them.
    """
    parameters = dict(named_logical_parameters(backbone))
    plain = {name for name, p in parameters.items() if _plain(p)}
    sampled = [
        name for name, p in parameters.items() if name not in leave_out and (name in plain or is_quantized(p.stored))
    ]
    matrices = [name for name in sampled if len(parameters[name].shape or ()) >= 2]
    chosen = _spread(matrices or sampled)
    quantized = [name for name in chosen if name not in plain]
    found = {
        "class": class_name(backbone),
        "structure": _hash((name, p.shape) for name, p in parameters.items()),
        "parameters": sum(p.numel for p in parameters.values()),
        "values": _finite({name: _sample(name, parameters[name].stored) for name in chosen if name in plain}),
    }
    if any(p.stored.shape != p.shape or not is_compute_dtype(p.stored.dtype) for p in parameters.values()):
        found["packed"] = _hash((name, p.shape) for name, p in own_parameters(backbone))
    rounded = {name: _rounded_sample(backbone, name, parameters[name]) for name in _every(quantized, _PACKED_TENSORS)}
    if any(rounded.values()):
        found["rounded"] = _finite(rounded)
    return found


def differences(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Returns the difference between two fingerprints as a text in a list. The list is empty for the same backbone."""
    # Format 1 saved the hash of the stored shapes as the structure.
    if saved["structure"] not in (found["structure"], found.get("packed")):
        return [
            f"trained on a {saved['class']} with {saved['parameters']:,} parameters, found a {found['class']} with "
            f"{found['parameters']:,}; their parameters' names or shapes differ"
        ]
    values = {name: value for name, value in saved["values"].items() if name in found["values"]}
    other = [name for name, value in values.items() if not _close(value, found["values"][name])]
    if other:
        return [f"the weights differ in {len(other)} of {len(values)} tensors compared, such as {', '.join(other[:3])}"]
    return _differences_of_rounded(saved, found)


def _differences_of_rounded(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Compares the weights that are quantized in at least one of the two backbones."""
    one, two = ({**side["values"], **side.get("rounded", {})} for side in (saved, found))
    names = [name for name in one if name in two and not (name in saved["values"] and name in found["values"])]
    pairs = [pair for name in names for pair in zip(one[name], two[name], strict=True)]
    apart, size = sum((a - b) ** 2 for a, b in pairs), sum(a**2 + b**2 for a, b in pairs)
    if len(pairs) < _PAIRS or apart <= _ROUNDED * size:
        return []
    return [
        f"the weights differ by more than quantization rounds, in {len(names)} tensors compared, such as "
        f"{', '.join(names[:3])}"
    ]


def _plain(parameter: LogicalParameter) -> bool:
    # Sharded and quantized weights are tensor subclasses. Reading single values of them fails or needs communication.
    stored = parameter.stored
    plain = type(stored) in (Tensor, nn.Parameter) or type(stored.data) is Tensor
    return plain and not stored.is_meta and is_compute_dtype(stored.dtype) and stored.numel() > 0


def _hash(shapes: Iterable[tuple[str, Sequence[int] | None]]) -> str:
    names = "\n".join(f"{name} {None if shape is None else tuple(shape)}" for name, shape in sorted(shapes))
    return hashlib.sha256(names.encode(errors="surrogatepass")).hexdigest()


def _spread(names: list[str]) -> list[str]:
    """At most `_TENSORS` names, evenly spread. The last eight are always among them, because heads come last."""
    if len(names) <= _TENSORS:
        return names
    tail = names[-8:]
    return _every(names[:-8], _TENSORS - len(tail)) + tail


def _every(names: list[str], most: int) -> list[str]:
    return names[:: max(1, math.ceil(len(names) / most))]


def _places(name: str, count: int) -> list[int]:
    seed = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    return [int.from_bytes(seed[8 * i : 8 * i + 8], "big") % count for i in range(_VALUES)]


def _sample(name: str, parameter: Tensor) -> list[float]:
    values: Any = parameter.detach()
    places = _places(name, values.numel())
    # Value by value takes half of the time, and of that numpy takes a sixth.
    if values.device.type == "cpu" and values.dtype in _OF_NUMPY:
        array = values.numpy()
        return [array.item(place) for place in places]
    flat = values.reshape(-1)
    if values.device.type == "cpu" and values.dtype in _WITHIN_FLOAT32:
        return [flat[place].item() for place in places]
    return [float(value) for value in flat[places].float().tolist()]


def _finite(samples: Mapping[str, list[float] | None]) -> dict[str, list[float]]:
    """Returns the samples that can be compared. Weights may hold infinite values, such as a mask, and JSON has none."""
    return {name: values for name, values in samples.items() if values is not None and all(map(math.isfinite, values))}


def _rounded_sample(backbone: nn.Module, name: str, parameter: LogicalParameter) -> list[float] | None:
    """The same entries as `_sample` takes, of a quantized linear layer's weight; None of other modules."""
    shape = parameter.shape or ()
    if len(shape) != 2 or parameter.name != "weight":
        return None
    return weight_entries(
        backbone.get_submodule(parent_of(name)), [divmod(place, shape[1]) for place in _places(name, parameter.numel)]
    )


def _close(a: list[float], b: list[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) for x, y in zip(a, b, strict=True))
