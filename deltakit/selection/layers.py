"""Finds the layers inside a container, and those that a method takes where its default positions do not exist."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from deltakit.core import Method, above, is_callable, linear_sizes, own_children, parent_of, wrapped_layer
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


@dataclass
class LayerSearch:
    """Finds the layers in containers that a method may take, without trying whether it can.

    These are linear layers, convolutions, and parameters with a role (the projections of torch's attention, stacks of
    experts). Norms and embeddings are among them if they are among the method's default positions.
    """

    index: BackboneIndex
    method: Method

    @cached_property
    def _also(self) -> set[str]:
        roles = {role for roles in self.method.positions() for role in roles}
        return {path for role in ("norm", "embed") if role in roles for path in self.index.roles.paths(role)}

    @cached_property
    def _parameters(self) -> dict[str, list[str]]:
        """The parameters with a role, by the module that holds them."""
        held: dict[str, list[str]] = {}
        for path in (path for unit in self.index.roles.units for path in unit.parts.values()):
            base, _ = self.index.split(path)
            if base in self.index.parameters:
                held.setdefault(parent_of(base), []).append(path)
        return held

    def inside(self, container: str) -> list[str]:
        """Returns the paths of the layers in the module at a path, or the path itself if that is a layer."""
        found: list[str] = []
        for path, module in _outermost(container, self.index.by_path[container]):
            found += self._parameters.get(path, [])
            known = (
                linear_sizes(module) is not None or isinstance(module, nn.modules.conv._ConvNd) or path in self._also
            )
            found += [path] if known and is_layer(module) else []
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


def trunk_layers(index: BackboneIndex, method: Method) -> tuple[list[str], str]:
    """Returns the layers in the blocks of a backbone, or all of its layers if it has no blocks, and what to call them.

    The head is not among them. Without blocks and without a head, the last layer is not, because it computes the output.
    """
    blocks, heads, search = index.roles.blocks, set(index.roles.head), LayerSearch(index, method)
    found = list(dict.fromkeys(path for root in blocks or ("",) for path in search.inside(root)))
    trunk = [path for path in found if heads.isdisjoint(above(path))]
    what = "the layers in its blocks" if blocks else "its layers"
    if len(trunk) < len(found):
        return trunk, f"{what} without the head"
    return (trunk, what) if blocks else (trunk[:-1], f"{what} without the last")
