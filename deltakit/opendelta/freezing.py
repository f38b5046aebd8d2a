"""Which parameters OpenDelta's `freeze_module` freezes, and which it leaves as they are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltakit.core import above, delta_children, join, own_children, own_parameters, parent_of
from deltakit.errors import warn
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
    by_entry: dict[str, set[int]] = field(default_factory=dict)
    """The ids of the backbone's parameters that an entry matched."""

    def tied(self) -> dict[str, set[int]]:
        """Returns the entries whose parameters are all frozen, because they are tied to some that no entry matched."""
        return {name: ids for name, ids in self.by_entry.items() if ids <= self.frozen.keys()}

    def without_gradients(self) -> list[str]:
        """Returns the entries whose parameters are left as they are, but do not require gradients."""
        kept = {name: [self.kept[key] for key in ids if key in self.kept] for name, ids in self.by_entry.items()}
        return [name for name, own in kept.items() if own and not any(parameter.requires_grad for parameter in own)]


def walk(module: nn.Module, addresses: Addresses, exclude: Sequence[str], prefix: str) -> Frozen:
    """Returns which parameters below a module are frozen, and which are left as they are."""
    result = Frozen()
    names = [name for name in exclude if name != "deltas"]

    def visit(inner: nn.Module, path: str, kept: frozenset[str]) -> None:
        kept |= _matched(path, names, addresses, result)
        # As in OpenDelta, the own parameters of a module around others are frozen whatever their names. So are those of a
        # layer with a delta.
        asked = names if is_leaf_module(inner) else [name for name in names if name in addresses.plain]
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                own = kept | _matched(join(path, name), asked, addresses, result)
                (result.kept if own else result.frozen)[id(parameter)] = parameter
                for entry in own:
                    result.by_entry.setdefault(entry, set()).add(id(parameter))
        for name, child in own_children(inner):
            visit(child, join(path, name), kept)
        for path_in, parameter in _parameters_of_deltas(inner):
            around = [join(path, inner_path) for inner_path in above(path_in) if inner_path]
            chosen = {name for name in names for key in around if matches(key, name)}
            result.matched |= chosen
            if not (kept or chosen or "deltas" in exclude):
                result.frozen_of_deltas.append(parameter)

    visit(module, prefix, frozenset())
    missing = {name for name in names if name not in result.matched}
    if missing - addresses.plain:
        # OpenDelta finds nothing then: among the model's own names, and those of all parameters, there may be something.
        addresses.plain |= missing
        return walk(module, addresses, exclude, prefix)
    for key in result.frozen:
        result.kept.pop(key, None)
    return result


def unfreeze(backbone: nn.Module, found: Frozen, froze: set[str]) -> None:
    """Lets what is excluded now, and was frozen by an earlier call, require gradients again, and removes it from `froze`."""
    for name, parameter in own_parameters(backbone):
        if name in froze and id(parameter) in found.kept:
            parameter.requires_grad_(True)
            froze.discard(name)


def warn_without_effect(module: nn.Module, found: Frozen, prefix: str) -> None:
    """Warns of entries of `exclude` that match parameters of a module of which none is trained."""
    for entry, ids in found.tied().items():
        own = [name for name, parameter in module.named_parameters(remove_duplicate=False) if id(parameter) in ids]
        paths = dict.fromkeys(join(prefix, parent_of(name)) for name in own)
        warn(
            f"freeze_module(exclude=...): {entry!r} has no effect: its parameters are tied to others that are frozen; "
            f"add all of {', '.join(map(repr, paths))} to exclude to train them"
        )
    frozen = found.without_gradients()
    if frozen:
        warn(
            f"freeze_module(exclude=...): {', '.join(map(repr, frozen))} will not be trained: no parameter there requires "
            "gradients, and what is excluded stays as it is; call requires_grad_(True) on the modules before freeze_module to "
            "train them, or leave them out of exclude"
        )


def is_leaf_module(module: nn.Module) -> bool:
    """Returns whether a module has no modules in it."""
    return next(module.children(), None) is None


def _matched(path: str, names: Sequence[str], addresses: Addresses, result: Frozen) -> frozenset[str]:
    found = frozenset(name for name in names if path and addresses.has(path, name))
    result.matched |= found
    return found


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
