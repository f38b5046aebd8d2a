"""What a method can serve on a backbone, tried out, and the advice that errors give from it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deltakit.core import Method, Target, fold, without_start_values
from deltakit.errors import DeltaError, OptionError
from deltakit.selection.index import BackboneIndex
from deltakit.selection.layers import LayerSearch, is_layer
from deltakit.selection.option_selectors import OptionSelectors

Refusal = tuple[str, DeltaError | None]
"""Why a method cannot serve a path, and the error that it raises there; "" and None if it can."""


def refusals(index: BackboneIndex, method: Method, paths: Iterable[str]) -> dict[str, Refusal]:
    """Returns by path why a method cannot serve it.

    It is tried out, because a method may refuse a target only when it builds the delta module.
    """
    options = OptionSelectors(index, method)
    with without_start_values():
        return {path: _refusal(options, index.target(path)) for path in dict.fromkeys(paths)}


def _refusal(options: OptionSelectors, target: Target) -> Refusal:
    method = options.method
    kind = method.kind_at(target)
    # Falcon-Mamba calls its projections or reads their weights, depending on its kernels.
    if kind is None or (target.weight_read is not None and not kind.patches_weight(target)):
        return "weight read directly", None
    try:
        options.at(target).build_at(target)
    except OptionError as error:
        return "an option does not fit its size", error
    except DeltaError as error:
        return "its weight is tied" if target.tied else "not a module that it can change", error
    return "", None


class Advice(NamedTuple):
    """What to write for `at=`: `selectors` that work with a method's options, and in `text` what an error says.

    If no selector works with these options, the text names one that works with others; it is "" if there is none either.
    """

    selectors: tuple[str, ...] = ()
    text: str = ""


def advice(index: BackboneIndex, method: Method, container: str = "") -> Advice:
    """Returns what to write for `at=` to reach what a method can serve in a container."""
    misfit = Advice()
    for candidates in _candidates(index, method, container):
        tried = refusals(index, method, candidates)
        served = fold(dict.fromkeys(_selector(index, path) for path, (why, _) in tried.items() if not why))
        if served:
            more = f" and {len(served) - 3} more" if len(served) > 3 else ""
            named = f"such as at={served[0]!r}; it can serve {', '.join(served[:3])}{more}"
            return Advice(served, f"name targets with at=, {named}")
        for path, (_, error) in tried.items():
            if isinstance(error, OptionError) and not misfit.text:
                at = _selector(index, path)
                misfit = Advice(text=f"name targets with at=, such as at={at!r}, and other options: {error}")
    return misfit


def _selector(index: BackboneIndex, path: str) -> str:
    return index.first_name(path) or "^"


def _candidates(index: BackboneIndex, method: Method, container: str) -> Iterator[list[str]]:
    """What a method may serve in a container, the best first: what a container means to it, other layers, parameters."""
    inside = f"{container}." if container else ""
    yield LayerSearch(index, method).inside(container)
    yield [path for path, module in index.by_path.items() if f"{path}.".startswith(inside) and is_layer(module)]
    parameters = {path: value for path, value in index.parameters.items() if path.startswith(inside)}
    # An LSTM's biases come last: BitFit reaches them by the name of the weight that they belong to, too.
    yield [path for path, value in parameters.items() if value.ndim > 1]
    yield list(parameters)
