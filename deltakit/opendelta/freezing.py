"""Which parameters OpenDelta's `freeze_module` freezes, and which it leaves as they are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltakit.core import above, delta_children, join, own_children
from deltakit.opendelta.matching import Addresses, matches

DELTA_NAMES: Mapping[str, str] = {"soft_prompt": "soft_prompt_layer", "compacter": "compactor"}
"""The names of delta modules in OpenDelta that are not those of deltakit's methods."""
PARAMETER_NAMES: Mapping[str, str] = {"A": "lora_A", "B": "lora_B"}
"""The names of parameters in OpenDelta that deltakit has other names for."""


@dataclass
class Frozen:
    """The result of a walk: the parameters by id. What one path freezes is frozen, whatever other paths it has (tied ones)."""

    frozen: dict[int, nn.Parameter] = field(default_factory=dict)
    kept: dict[int, nn.Parameter] = field(default_factory=dict)
    frozen_of_deltas: list[nn.Parameter] = field(default_factory=list)
    matched: set[str] = field(default_factory=set)
    """The entries of `exclude` that matched something."""


def walk(module: nn.Module, addresses: Addresses, exclude: Sequence[str], prefix: str) -> Frozen:
    """Returns which parameters below a module are frozen, and which are left as they are."""
    result = Frozen()
    names = [name for name in exclude if name != "deltas"]

    def visit(inner: nn.Module, path: str, kept: bool) -> None:
        kept = kept or _matched(path, names, addresses, result)
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                own = kept or _matched(join(path, name), names, addresses, result)
                (result.kept if own else result.frozen)[id(parameter)] = parameter
        for name, child in own_children(inner):
            visit(child, join(path, name), kept)
        for path_in, parameter in _parameters_of_deltas(inner):
            around = [join(path, inner_path) for inner_path in above(path_in) if inner_path]
            chosen = {name for name in names for key in around if matches(key, name)}
            result.matched |= chosen
            if not (kept or chosen or "deltas" in exclude):
                result.frozen_of_deltas.append(parameter)

    visit(module, prefix, False)
    missing = {name for name in names if name not in result.matched}
    if addresses.common and missing - addresses.plain:
        # As in `Addresses.select`.
        addresses.plain |= missing
        return walk(module, addresses, exclude, prefix)
    for key in result.frozen:
        result.kept.pop(key, None)
    return result


def _matched(path: str, names: Sequence[str], addresses: Addresses, result: Frozen) -> bool:
    found = {name for name in names if path and addresses.has(path, name)}
    result.matched |= found
    return bool(found)


def _parameters_of_deltas(target: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters of the deltas at a target, with the paths that they have in OpenDelta (`lora.lora_A`)."""
    for key, module in delta_children(target).items():
        record: Any = module.record
        # The method's name is in the key, behind the delta's.
        rest = key.removeprefix(f"{record.name}_") if record is not None else ""
        methods = sorted((own.name for own in (record.methods if record is not None else ())), key=len)
        method = next((name for name in reversed(methods) if rest.startswith(name)), "")
        for name, parameter in module.named_parameters():
            inside = ".".join(PARAMETER_NAMES.get(part, part) for part in name.split("."))
            yield join(DELTA_NAMES.get(method, method), inside), parameter
