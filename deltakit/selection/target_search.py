"""Turns selectors into targets: the modules, parameters and feature slices that a method is attached to."""

from collections.abc import Sequence
from itertools import chain

from torch import nn

from deltakit.core import Method, Selector, Target, above, checked, is_of, type_names
from deltakit.errors import OptionError, TargetError
from deltakit.selection.default_positions import Found, default_positions
from deltakit.selection.index import BackboneIndex
from deltakit.selection.layers import LayerSearch, is_container, takes_layers
from deltakit.selection.served import advice, refusals


@checked
def select(
    backbone: nn.Module,
    at: Selector,
    *,
    of: type[nn.Module] | str | Sequence[type[nn.Module] | str] | None = None,
    exclude: Selector | None = None,
) -> dict[str, nn.Module | nn.Parameter]:
    """Returns what a selector matches, by path: modules, or parameters if the selector names them.

    For a feature slice such as `c_attn[q]` the value is the whole fused projection.

    >>> list(select(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "*", of=nn.Linear))
    ['0']

    Args:
        at: one selector or several; a path is selected if one of them matches.
        of: only modules of these classes, given as classes or as class names.
        exclude: selectors of what is removed again.

    Raises:
        SelectorError: if a selector is malformed or matches nothing, or if `of` and `exclude` remove all matches.
        RoleError: if a role does not exist, or this backbone has no sure answer for it.
        TargetError: if the backbone is not a `torch.nn.Module`.
        OptionError: if `of` holds something else than classes and names.
    """
    index = BackboneIndex(backbone)
    paths = index.select(at, of=type_names(of), exclude=exclude)
    return {path: index.parameters[path] if path in index.parameters else index.module_at(path)[0] for path in paths}


def find_targets(index: BackboneIndex, method: Method) -> tuple[list[Target], Found]:
    """Returns the targets of a method, and how they were found.

    Targets come from the method's `at=`, or else from its default positions. For a method whose default positions are layers,
    a container that `at=` selects means the layers in it.

    Raises:
        SelectorError: if a selector is malformed or matches nothing, or if `of` and `exclude` remove all matches.
        RoleError: if a role has no sure answer on this backbone, or the backbone has no default position.
        TargetError: if a selected container has no layer in it that the method can serve.
    """
    found, of = Found(), type_names(method.of)
    selected: list[Target] | None = None
    if method.at is not None:
        found.paths = index.select(method.at)
        if takes_layers(method):
            of = _into_containers(index, method, found, of)
    elif method.positions():
        found = default_positions(index, method)
    if method.at is not None or method.positions():
        selected = [index.target(path) for path in found.paths]
    # Narrowed behind the method's own choice: of a whole encoder, Prefix takes its attention, from which `exclude` removes.
    chosen = {target.path: target for target in method.targets(index, selected)}
    wanted = f"the default of {method.name}" if method.at is None else repr(method.at)
    inside = takes_layers(method)
    found.paths = index.narrow(list(chosen), of=of, exclude=method.exclude, wanted=wanted, inside=inside)
    return [chosen.get(path) or index.target(path) for path in found.paths], found


def _into_containers(
    index: BackboneIndex, method: Method, found: Found, of: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """Replaces each container among the paths by the layers in it. Returns the `of` that is left to apply.

    `of` may name the class of the containers, or that of the layers in them.
    """
    excluded = index.select(method.exclude) if method.exclude else []
    everything: list[str] = []
    of_type: list[str] = []
    for path, layers in _layers_by_container(index, method, found).items():
        inside = [path] if layers is None else layers
        if layers is not None:
            # What `exclude` removes need not have layers in it.
            inside = inside or ([path] if path in excluded else [])
            if of is None or is_of(index.by_path[path], of):
                of_type += inside or _refuse_container(index, method, path, found)
        everything += inside
        of_type += [p for p in inside if of is None or (not index.module_at(p)[1] and is_of(index.module_at(p)[0], of))]
    found.paths = list(dict.fromkeys(of_type or everything))
    return None if of_type else of


def _layers_by_container(index: BackboneIndex, method: Method, found: Found) -> dict[str, list[str] | None]:
    """For each selected container the layers in it that the method takes, and None for each other path."""
    # A parameter and a feature slice are no modules. The name of a module may look like a slice, though.
    containers = [path for path in found.paths if path in index.by_path and is_container(index.by_path[path])]
    search = LayerSearch(index, method)
    inside = {path: search.inside(path) for path in containers}
    # Each layer is tried once, however many of the selected containers hold it: `**` selects all containers around it.
    for path, (why, error) in refusals(index, method, chain.from_iterable(inside.values())).items():
        # An option that does not fit, such as a rank above a layer's size, is left to fail when the layer's module is built.
        if why and not isinstance(error, OptionError):
            found.left_out[path] = why
    taken = {path: [layer for layer in layers if layer not in found.left_out] for path, layers in inside.items()}
    return {path: taken.get(path) for path in found.paths}


def _refuse_container(index: BackboneIndex, method: Method, path: str, found: Found) -> list[str]:
    there = [f"{other} ({why})" for other, why in found.left_out.items() if path in above(index.split(other)[0])]
    instead = advice(index, method, path).text or "select a module with linear layers or convolutions in it"
    raise TargetError(
        f"{path or 'the backbone'}: {method.name} is attached to layers, and this {type(index.by_path[path]).__name__} has "
        f"no linear layer or convolution in it that it can serve{': ' + ', '.join(there[:3]) if there else ''}; {instead}; "
        "or leave this one out with exclude="
    )
