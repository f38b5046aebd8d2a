"""Recognises a backbone by its structure and a few values of its weights.

Values are compared with a tolerance, so a backbone loaded in bfloat16 or float16 still matches.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import class_name, own_parameters

# bfloat16 has 8 significant bits, and float16 rounds values below 6e-8 to zero. Both stay within these tolerances.
_RELATIVE, _ABSOLUTE = 2e-2, 1e-6
_TENSORS, _VALUES = 256, 2


def fingerprint(backbone: nn.Module, *, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Returns the fingerprint of a backbone without its deltas.

    It has the class, a hash of all parameters' names and shapes, their number, and sampled values by parameter name.
    Weights on the meta device and quantized weights have no samples.

    Args:
        leave_out: the names of parameters whose values are omitted, because training changed them.
    """
    parameters = dict(own_parameters(backbone))
    names = "\n".join(f"{name} {tuple(p.shape)}" for name, p in sorted(parameters.items()))
    sampled = [name for name, p in parameters.items() if name not in leave_out and _has_values(p)]
    matrices = [name for name in sampled if parameters[name].ndim >= 2]
    return {
        "class": class_name(backbone),
        "structure": hashlib.sha256(names.encode()).hexdigest(),
        "parameters": sum(p.numel() for p in parameters.values()),
        "values": {name: _sample(name, parameters[name]) for name in _spread(matrices or sampled)},
    }


def differences(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Returns the difference between two fingerprints as a text in a list. The list is empty for the same backbone."""
    if saved["structure"] != found["structure"]:
        return [
            f"trained on a {saved['class']} with {saved['parameters']:,} parameters, found a {found['class']} with "
            f"{found['parameters']:,}; their parameters' names or shapes differ"
        ]
    values = {name: value for name, value in saved["values"].items() if name in found["values"]}
    other = [name for name, value in values.items() if not _close(value, found["values"][name])]
    if other:
        return [f"the weights differ in {len(other)} of {len(values)} tensors compared, such as {', '.join(other[:3])}"]
    return []


def _has_values(parameter: Tensor) -> bool:
    # Sharded and quantized weights are tensor subclasses. Reading single values of them fails or needs communication.
    plain = type(parameter) in (Tensor, nn.Parameter) or type(parameter.data) is Tensor
    return plain and not parameter.is_meta and torch.is_floating_point(parameter) and parameter.numel() > 0


def _spread(names: list[str]) -> list[str]:
    """At most `_TENSORS` names, evenly spread. The last eight are always among them, because heads come last."""
    if len(names) <= _TENSORS:
        return names
    tail = names[-8:]
    body = names[:-8]
    step = math.ceil(len(body) / (_TENSORS - len(tail)))
    return body[::step] + tail


def _sample(name: str, parameter: Tensor) -> list[float]:
    seed = hashlib.sha256(name.encode()).digest()
    flat = parameter.detach().reshape(-1)
    places = [int.from_bytes(seed[8 * i : 8 * i + 8], "big") % flat.numel() for i in range(_VALUES)]
    return [float(value) for value in flat[places].float().tolist()]


def _close(a: list[float], b: list[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) for x, y in zip(a, b, strict=True))
