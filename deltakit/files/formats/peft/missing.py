"""Warns of modules that an adapter of PEFT names and has no tensors for. They stay as they are in the backbone."""

from collections.abc import Iterable, Sequence

from torch import nn

from deltakit.core import own_modules
from deltakit.errors import warn
from deltakit.files.formats.layers import Layers
from deltakit.files.formats.patterns import Pattern
from deltakit.files.formats.source import Source


def warn_missing(source: Source, layers: Layers, adapted: Iterable[str], full: Iterable[str]) -> None:
    """Warns if `target_modules` or `modules_to_save` name modules of the backbone that the adapter has nothing for.

    Args:
        layers: the types of modules that PEFT has the method for.
        adapted: the paths that it has tensors of an adapter for.
        full: the names of the backbone's tensors that it has.
    """
    if source.backbone is None:
        return
    modules = dict(own_modules(source.backbone))
    have = {*adapted}
    saved = _texts(source.config.get("modules_to_save"))
    owners = {name.rpartition(".")[0] for name in full}
    kept = [path for path in modules if _is_named(path, saved)]
    missing = [path for path in kept if not any(owner == path or owner.startswith(f"{path}.") for owner in owners)]
    targets = _targets(source, modules, layers)
    missing += [path for path in targets if path not in have and not path.startswith(tuple(f"{k}." for k in kept))]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        warn(
            f"{source.folder}: its config names modules of this backbone that it has no tensors for: "
            f"{', '.join(missing[:3])}{more}; they stay as they are; save or download the adapter again if they were trained"
        )


def _targets(source: Source, modules: dict[str, nn.Module], layers: Layers) -> list[str]:
    """Returns the paths that `target_modules` means, where nothing else narrows them."""
    config = source.config
    if any(
        config.get(option) is not None for option in ("layers_to_transform", "exclude_modules", "target_parameters")
    ):
        return []
    named = config.get("target_modules")
    if isinstance(named, str):
        pattern = Pattern(f"({named})$", named, source.config_file / "target_modules")
        found = [path for path in modules if pattern.matches(path)] if named != "all-linear" else []
    else:
        names = _texts(named)
        found = [path for path in modules if _is_named(path, names)]
    kept = _texts(config.get("modules_to_save"))
    return [path for path in found if layers.include(modules[path]) and not _is_named(path, kept)]


def _is_named(path: str, names: Sequence[str]) -> bool:
    """Returns whether a path is one of the names, or ends with one."""
    return path in names or path.endswith(tuple(f".{name}" for name in names))


def _texts(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str) and name] if isinstance(value, list) else []
