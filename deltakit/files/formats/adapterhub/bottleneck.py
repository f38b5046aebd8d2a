"""Reads AdapterHub's bottleneck adapters and compacters.

h is the output of a part, r the residual, and N the norm after it (in models built like BERT). A sequential adapter f gives,
by its options `original_ln_before`, `original_ln_after` and `residual_before_ln`:

    no,  yes, any:   N(h + f(h) + r)               an Adapter on the part
    yes, yes, true:  N(h + f(N(h + r)) + r)        an Adapter on the norm that adds to its input
                     (h + r) + f(h + r)            without N: an Adapter on the layer
    yes, no,  false: N(h + r) + f(N(h + r))        an Adapter on the norm, or without N on the layer

and a parallel one N(h + s f(r) + r). Other combinations put the adapter where deltakit has none.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from deltakit.errors import CheckpointError, warn
from deltakit.files.formats.activations import activation_of
from deltakit.files.formats.adapterhub.invertible import read_invertible
from deltakit.files.formats.adapterhub.keys import IN_ADAPTERHUB, by_place
from deltakit.files.formats.adapterhub.phm import compacter
from deltakit.files.formats.adapterhub.places import Place, place_of
from deltakit.files.formats.format import Parts
from deltakit.files.formats.source import Source

BY_PLACE = frozenset(("adapter", "compacter", "parallel_adapter", "invertible_adapter"))
"""The methods whose modules only a backbone shows."""
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_NAMES = {
    "adapter_down.0.weight": "down.weight",
    "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight",
    "adapter_up.bias": "up.bias",
}
_GATE = ("gate.weight", "gate.bias")
_ABSENT = {
    "ln_before": "a norm of its own before the bottleneck",
    "ln_after": "a norm of its own after the bottleneck",
    "cross_adapter": "adapters after cross-attention",
    "shared_W_phm": "weights shared over all layers",
}
"""Options that deltakit does not have."""


class _Config(TypedDict, total=False):
    non_linearity: str
    original_ln_before: bool
    original_ln_after: bool
    residual_before_ln: bool | str
    is_parallel: bool
    scaling: float | str
    use_gating: bool
    phm_layer: bool
    dropout: float
    stochastic_depth: float | None


_DEFAULTS = _Config(
    original_ln_before=False,
    original_ln_after=True,
    residual_before_ln=True,
    is_parallel=False,
    scaling=1.0,
    use_gating=False,
    phm_layer=False,
    dropout=0.0,
    stochastic_depth=0.0,
)


def read_bottlenecks(source: Source, name: object, config: Mapping[str, Any], parts: Parts) -> None:
    """Adds the bottleneck adapters of a folder to the parts.

    Raises:
        CheckpointError: if it has options that deltakit does not have, or does not fit the backbone.
    """
    for option, what in _ABSENT.items():
        if config.get(option):
            raise CheckpointError(
                f"{source.folder}: this adapter of AdapterHub has {what} ({option}), which deltakit does not have"
                f"{IN_ADAPTERHUB}"
            )
    options: Any = source.options(_Config, _DEFAULTS, "config")
    activation = _activation(options, source)
    _warn_of_dropout(options, source)
    read_invertible(source, name, activation, parts)
    shared: set[tuple[Any, ...]] = set()
    for owner, tensors in by_place(source.tensors, "adapters", name).items():
        place = place_of(source.backbone, owner, source.folder) if source.backbone is not None else None
        target, to = _target(options, place, owner, source.folder)
        gate = _gate(options, tensors, source.folder, owner)
        tensors = {key: tensor for key, tensor in tensors.items() if key not in gate}
        if options["is_parallel"]:
            _add_parallel(parts, source, options, activation, (owner, place), tensors, gate)
            continue
        if options["phm_layer"]:
            method, layers = compacter(config, tensors, name, source, owner)
        else:
            layers = _layers(tensors, source.folder, owner, _factor(options, tensors, source.folder, owner))
            method = {"size": len(layers["down.bias"])}
        method |= {"activation": activation, "add_to": to, **({"gate": True} if gate else {})}
        if "shared.rule" in layers and tuple(method.items()) in shared:
            # The first target holds what all of them share.
            del layers["shared.rule"]
        shared.add(tuple(method.items()))
        parts.add("compacter" if options["phm_layer"] else "adapter", method, target, layers | gate)


def _gate(options: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path, owner: str) -> dict[str, Tensor]:
    """Returns the two tensors of an adapter's gate; none if it has no gate."""
    if not options["use_gating"]:
        return {}
    if any(name not in tensors for name in _GATE):
        raise CheckpointError(f"{where}: its adapter at {owner} lacks its gate; save or download it again")
    return {name: tensors[name] for name in _GATE}


def _warn_of_dropout(options: Mapping[str, Any], source: Source) -> None:
    dropped = max(options["dropout"], options["stochastic_depth"] or 0.0)
    if dropped and source.backbone is not None:
        warn(
            f"{source.folder}: it was trained with a dropout of {dropped:g} in the adapters, which deltakit does not have: "
            "outputs are the same, and training goes on without it"
        )


def _activation(options: Mapping[str, Any], source: Source) -> str:
    written = str(options.get("non_linearity", "")).lower()
    # The first library called them otherwise, and wrote no version.
    return activation_of(
        written if "version" in source.config else _OLD_ACTIVATIONS.get(written, written), source.folder
    )


def _target(options: Mapping[str, Any], place: Place | None, owner: str, where: Path) -> tuple[str, str]:
    """Returns the path of the module that the adapter is on, and whether it adds to its output or its input."""
    before, after, residual = (
        options[key] for key in ("original_ln_before", "original_ln_after", "residual_before_ln")
    )
    if options["is_parallel"] and after:
        return place.part if place is not None else owner, "output"
    if options["is_parallel"] or (before, after, residual) not in (
        (False, True, True),
        (False, True, False),
        (True, True, True),
        (True, False, False),
    ):
        raise CheckpointError(
            f"{where}: this adapter of AdapterHub has original_ln_before={before}, original_ln_after={after} and "
            f"residual_before_ln={residual!r}, which puts it where deltakit has no adapter"
            f"{IN_ADAPTERHUB}"
        )
    if place is None:
        return owner, "input" if before and after else "output"
    if not before:
        return place.part, "output"
    if place.total is None:
        raise CheckpointError(
            f"{where}: its adapter at {owner} reads the residual after attention (original_ln_before), which no module "
            f"of this backbone returns{IN_ADAPTERHUB}"
        )
    return place.total, "input" if after and place.norm is not None else "output"


def _add_parallel(
    parts: Parts,
    source: Source,
    options: Mapping[str, Any],
    activation: str,
    where: tuple[str, Place | None],
    tensors: Mapping[str, Tensor],
    gate: dict[str, Tensor],
) -> None:
    owner, place = where
    if options["phm_layer"]:
        raise CheckpointError(
            f"{source.folder}: this adapter of AdapterHub is a parallel compacter, which deltakit lacks{IN_ADAPTERHUB}"
        )
    layers = _layers(tensors, source.folder, owner, None)
    scaling = options["scaling"]
    if isinstance(scaling, str):
        layers["gain"] = _gain(tensors, source.folder, owner)
    method = {
        "size": len(layers["down.bias"]),
        "activation": activation,
        "scaling": scaling,
        "source": f"^{place.source}" if place is not None else None,
        **({"gate": True} if gate else {}),
    }
    parts.add("parallel_adapter", method, place.part if place is not None else owner, layers | gate)
    if place is not None:
        # What hands the input of this module over has no tensors.
        parts.add("parallel_adapter", method, place.source, {})


def _layers(tensors: Mapping[str, Tensor], where: Path, owner: str, factor: Tensor | float | None) -> dict[str, Tensor]:
    """Returns the tensors of the two linear layers, with a factor on their result multiplied into the second one."""
    found = {ours: tensors[theirs] for theirs, ours in _NAMES.items() if theirs in tensors}
    strange = sorted(tensors.keys() - _NAMES.keys() - {"scaling"})
    if len(found) < len(_NAMES) or strange or found["down.bias"].ndim != 1:
        what = f"it also has {strange[0]}" if strange else "one of its tensors is missing"
        raise CheckpointError(
            f"{where}: its adapter at {owner} is no bottleneck of two linear layers: {what}; save or download it again"
        )
    if factor is not None:
        weight, bias = found["up.weight"], found["up.bias"]
        found["up.weight"] = weight * (factor.reshape(-1, 1) if isinstance(factor, Tensor) else factor)
        found["up.bias"] = bias * factor
    return found


def _factor(
    options: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path, owner: str
) -> Tensor | float | None:
    scaling = options["scaling"]
    if isinstance(scaling, str):
        return _gain(tensors, where, owner)
    return None if scaling == 1 else float(scaling)


def _gain(tensors: Mapping[str, Tensor], where: Path, owner: str) -> Tensor:
    if "scaling" not in tensors:
        raise CheckpointError(f"{where}: its adapter at {owner} lacks its trained scaling; save or download it again")
    scaling = tensors["scaling"]
    outputs = tensors["adapter_up.bias"].numel() if "adapter_up.bias" in tensors else 1
    if scaling.ndim != 1 or len(scaling) not in (1, outputs):
        raise CheckpointError(
            f"{where}: its adapter at {owner} has a scaling of shape {tuple(scaling.shape)} for {outputs} outputs; save or "
            "download it again"
        )
    return scaling
