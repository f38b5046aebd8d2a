"""Finds the layers inside a container, and those that a method takes where its default positions do not exist."""

from collections.abc import Iterator

from torch import Tensor, nn

from deltakit.core import Method, above, is_callable, linear_sizes, own_children, parent_of, split_slice, wrapped_layer
from deltakit.core import join as joined
from deltakit.selection.index import BackboneIndex

_WHOLE_PARTS = frozenset({"attn", "attn.self", "attn.cross", "ff", "block"})


def takes_layers(method: Method) -> bool:
    """Returns whether all default positions of a method are layers. To such a method a container means the layers inside."""
    roles = {role for roles in method.positions() for role in roles}
    return bool(roles) and not roles & _WHOLE_PARTS


def is_layer(module: nn.Module) -> bool:
    """Returns whether a module computes with a weight of its own.

    >>> is_layer(nn.Linear(2, 3)), is_layer(nn.Sequential(nn.Linear(2, 3))), is_layer(nn.ReLU())
    (True, False, False)
    """
    if not is_callable(module) or wrapped_layer(module) is not None:
        # PEFT's wrapper has the weight of the layer in it, which is the one to take.
        return False
    return linear_sizes(module) is not None or isinstance(getattr(module, "weight", None), Tensor)


def is_container(module: nn.Module) -> bool:
    """Returns whether a module has other modules or parameters in it, and is no layer.

    >>> is_container(nn.Sequential(nn.ReLU())), is_container(nn.ReLU()), is_container(nn.MultiheadAttention(4, 2))
    (True, False, True)
    """
    return not is_layer(module) and (any(own_children(module)) or bool(module._parameters))


def layers_in(index: BackboneIndex, container: str, method: Method) -> list[str]:
    """Returns the paths of the layers in a container that a method may take, without trying whether it can.

    These are linear layers, convolutions, and parameters with a role (the projections of torch's attention, stacks of
    experts). Norms and embeddings are among them if they are among the method's default positions.
    """
    roles = {role for roles in method.positions() for role in roles}
    wanted = {path for role in ("norm", "embed") if role in roles for path in index.roles.paths(role)}
    parameters = [p for unit in index.roles.units for p in unit.parts.values() if split_slice(p)[0] in index.parameters]
    by_owner: dict[str, list[str]] = {}
    for path in parameters:
        by_owner.setdefault(parent_of(split_slice(path)[0]), []).append(path)
    found: list[str] = []
    for path, module in _outermost(container, index.by_path[container]):
        found += by_owner.get(path, [])
        if linear_sizes(module) is not None or isinstance(module, nn.modules.conv._ConvNd) or path in wanted:
            found += [path] if is_layer(module) else []
    return found


def _outermost(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules at and below a path, but not those inside layers, and of PEFT's wrappers only the layer in them."""
    yield path, module
    if is_layer(module):
        return
    wrapped = wrapped_layer(module)
    for name, child in own_children(module):
        if wrapped is None or child is wrapped:
            yield from _outermost(joined(path, name), child)


def trunk_layers(index: BackboneIndex, method: Method) -> list[str]:
    """Returns the layers in the blocks of a backbone; if it has no blocks, all of its layers but the head or the last."""
    blocks, heads = index.roles.blocks, set(index.roles.head)
    found = list(dict.fromkeys(path for root in blocks or ("",) for path in layers_in(index, root, method)))
    trunk = [path for path in found if heads.isdisjoint(above(path))]
    # Without blocks and without a module that is named a head, the last layer computes the output.
    return trunk if blocks or heads else trunk[:-1]
