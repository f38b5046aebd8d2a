"""The parts of a file of image models: one for each component of the pipeline. A backbone is one component."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from deltakit.core import linear_sizes
from deltakit.errors import CheckpointError
from deltakit.files.formats.images.keys import absent, read_key
from deltakit.files.formats.images.lycoris import update_sizes
from deltakit.files.formats.images.names import Names
from deltakit.files.formats.shapes import refuse_integers


@dataclass
class Layer:
    """What a file has for one module."""

    name: str
    flat: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def sizes(self) -> tuple[int, int] | None:
        """Returns how many inputs and outputs its update has; None without one."""
        other = update_sizes(self.tensors)
        if other is not None:
            return other
        a, b, mid = (self.tensors.get(name) for name in ("A", "B", "mid"))
        if a is None or b is None:
            return None
        return a[0].numel() * (mid[0, 0].numel() if mid is not None and mid.ndim > 2 else 1), b.shape[0]


@dataclass
class Part:
    """What a file has for one component."""

    component: str
    layers: dict[str, Layer] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    """The keys that have no known end."""

    def paths(self, names: Names) -> dict[str, str | None]:
        """Returns the path of each layer's module in a backbone, or None if there is none."""
        return {name: names.path(self.component, name, layer.flat) for name, layer in self.layers.items()}


def parts_of(tensors: Mapping[str, Tensor], place: Path) -> list[Part]:
    """Returns the parts of a file.

    Raises:
        CheckpointError: if it has two tensors for one thing.
    """
    found: dict[str, Part] = {}
    for full, tensor in tensors.items():
        key = read_key(full)
        part = found.setdefault(key.component, Part(key.component))
        if not key.tensor:
            part.strange.append(full)
            continue
        layer = part.layers.setdefault(key.module, Layer(key.module, key.flat))
        if key.tensor in layer.tensors:
            raise CheckpointError(f"{place}: it has {full} in two spellings; save or download it again")
        if key.tensor != "alpha":
            refuse_integers({full: tensor}, place)
        layer.tensors[key.tensor] = tensor
    return list(found.values())


def part_for(parts: list[Part], names: Names, place: Path) -> tuple[Part, dict[str, str]]:
    """Returns the part that fits a backbone, and the path of each of its layers there.

    The names and the shapes of the tensors decide: the component's name says only what it is called in its pipeline.

    Raises:
        CheckpointError: if none fits, or several.
    """
    if not any(layer.tensors.keys() - {"alpha"} for part in parts for layer in part.layers.values()):
        # No backbone fits a file without any tensor that deltakit knows.
        refuse_strange(parts, place)
    paths = [part.paths(names) for part in parts]
    problems = [_problem(part, found, names) for part, found in zip(parts, paths, strict=True)]
    fitting = [number for number, problem in enumerate(problems) if not problem]
    kind = names.backbone
    if len(fitting) > 1:
        both = " and ".join(sorted(parts[number].component or "no prefix" for number in fitting))
        raise CheckpointError(
            f"{place}: its parts for {both} both fit this {kind}; save the tensors of one of them as a file of their own"
        )
    if not fitting:
        shares = [sum(path is not None for path in found.values()) / max(1, len(found)) for found in paths]
        best = max(range(len(parts)), key=shares.__getitem__)
        if not shares[best]:
            listed = ", ".join(sorted(part.component or "without prefix" for part in parts))
            raise CheckpointError(
                f"{place}: none of its parts ({listed}) fits this {kind}, which has no module such as "
                f"{_first(parts[best])}; load the component of the pipeline that it was trained on"
            )
        raise CheckpointError(f"{place}: {problems[best]}; load the component of the pipeline that it was trained on")
    chosen = fitting[0]
    return parts[chosen], {name: path for name, path in paths[chosen].items() if path is not None}


def refuse_strange(parts: Iterable[Part], place: Path) -> None:
    """Refuses parts with tensors that deltakit does not know.

    Raises:
        CheckpointError: if there is one.
    """
    strange = [key for part in parts for key in part.strange]
    # What says which method it is comes before what does not.
    for key in sorted(strange, key=lambda key: not absent(key))[:1]:
        what = absent(key)
        if what:
            raise CheckpointError(
                f"{place}: it has {what} ({key}), which deltakit does not have; use it in the library that it was trained with"
            )
        raise CheckpointError(f"{place}: {key} is in no format of LoRA that deltakit reads; remove it from the file")


def _first(part: Part) -> str:
    return next(iter(part.layers), "") or next(iter(part.strange), "")


def _problem(part: Part, paths: Mapping[str, str | None], names: Names) -> str:
    """Returns why a part does not fit a backbone; "" if it does."""
    where = f"its part for {part.component}" if part.component else "it"
    missing = [name for name, path in paths.items() if path is None]
    if missing or not paths:
        shown = missing[0] if missing else _first(part)
        return f"{len(missing)} of the {len(paths)} layers that {where} has are not in this backbone, such as {shown}"
    seen: dict[str, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        if seen.setdefault(path, name) != name:
            return f"{name} and {seen[path]} are both {path} of this backbone"
        found, module = part.layers[name].sizes(), names.modules[path]
        expected = _sizes(module)
        if found is not None and expected is None:
            return f"it has a LoRA at {path}, which is a {type(module).__name__}"
        if found is not None and expected is not None and found != expected:
            needs = f"{expected[0]} to {expected[1]}"
            return f"{path}: the file has a LoRA of {found[0]} to {found[1]} features, and the backbone needs {needs}"
    return ""


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Returns how many inputs and outputs a LoRA of a module has; None if it can have none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.weight[0].numel(), module.weight.shape[0]
    return linear_sizes(module)
