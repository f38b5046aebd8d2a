"""The facts about a backbone's modules that role inference needs, collected in one walk."""

from collections.abc import Mapping
from functools import cached_property

from torch import nn

from deltakit.core import above, name_of, parent_of, projection_sizes, wrapped_layer


class Walk:
    """The modules of a backbone by path, their children, and their linear layers with input and output sizes."""

    def __init__(self, backbone: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.backbone = backbone
        self.order = {path: place for place, path in enumerate(modules)}
        self.modules = _without_wrappers_parts(modules)
        modules = self.modules
        self.linears: dict[str, tuple[int, int]] = {}
        for path, module in modules.items():
            size = projection_sizes(module)
            # A layer counts once: not its wrapper, and not the small layers that some libraries keep inside a layer.
            if size and wrapped_layer(module) is None and self.linears.keys().isdisjoint(above(parent_of(path))):
                self.linears[path] = size
        self.children: dict[str, list[str]] = {path: [] for path in modules}
        for path in modules:
            if path and parent_of(path) in self.children:
                self.children[parent_of(path)].append(path)

    @cached_property
    def _linears_below(self) -> dict[str, list[str]]:
        below: dict[str, list[str]] = {}
        for linear in self.linears:
            for path in above(linear):
                below.setdefault(path, []).append(linear)
        return below

    def linears_below(self, path: str) -> list[str]:
        """Returns the paths of the linear layers at and below a path."""
        return self._linears_below.get(path, [])

    def names(self, path: str) -> dict[str, str]:
        """Returns the linear layers that are children of a path, or alone inside a child, by the name of that child."""
        alone = {name_of(child): self.linears_below(child) for child in self.children[path]}
        return {name: linears[0] for name, linears in alone.items() if len(linears) == 1}

    @cached_property
    def norms(self) -> list[str]:
        """The paths of the norms that have a weight for each feature."""
        return [path for path, module in self.modules.items() if _is_norm(module)]

    @cached_property
    def norm_sizes(self) -> set[int]:
        """The numbers of features of all norms."""
        return {int(self.modules[path].weight.numel()) for path in self.norms}  # type: ignore[operator]

    @cached_property
    def repeated(self) -> set[str]:
        """The repeated blocks: children of a list in which at least two have the same class.

        A list whose children all differ is the inside of a block (T5's `layer`).
        """
        repeated: set[str] = set()
        for path, module in self.modules.items():
            if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                inner = [child for child in self.children[path] if self.children[child]]
                kinds = {type(self.modules[child]) for child in inner}
                if len(inner) == 1 or len(kinds) < len(inner):
                    repeated.update(inner)
        return repeated

    def block_around(self, path: str) -> str | None:
        """Returns the innermost repeated block around a path, or None."""
        return next((other for other in above(parent_of(path)) if other in self.repeated), None) if path else None

    def block(self, path: str) -> str:
        """Returns the repeated block around a unit; if there is none, its parent module."""
        around = self.block_around(path)
        return parent_of(path) if around is None else around


def _without_wrappers_parts(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules without what PEFT's wrappers hold beside the layer that they wrap."""
    wrappers = {path for path, module in modules.items() if wrapped_layer(module) is not None}
    if not wrappers:
        return dict(modules)
    return {
        path: module
        for path, module in modules.items()
        if not any(parent_of(at) in wrappers and name_of(at) != "base_layer" for at in above(path) if at)
    }


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1
