"""What in a plan may be a mistake: layers that are left out, modules that are hit twice, tied or never called."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import attrgetter

from torch import nn

from deltakit.core import (
    DeltaModule,
    Inputs,
    Method,
    above,
    are_apart,
    attachments_of,
    class_name,
    fold,
    join,
    own_children,
    parent_of,
    span,
    trial_call,
    wrapped_layer,
)
from deltakit.injection import recorded_calls
from deltakit.selection import BackboneIndex


@dataclass(frozen=True)
class Hits:
    """The delta modules of one method in a plan, by the path of their target.

    `goes_on`: it is a part of the method before it, because an option differs between targets.
    """

    method: Method
    built: Mapping[str, DeltaModule]
    goes_on: bool


def remarks(
    index: BackboneIndex, hits: Sequence[Hits], fully_trained: Collection[str], called: Collection[str] | None
) -> tuple[tuple[str, ...], ...]:
    """Returns the remarks on each method of a plan.

    Args:
        fully_trained: the names of the parameters that the plan trains fully.
        called: the paths of the modules that a forward called; None if there was none.
    """
    found = []
    for number, own in enumerate(hits):
        lines = [] if own.goes_on else list(holes(index, _of_method(hits[number:])))
        lines += _overlaps(own, hits[:number])
        lines += _attached_already(index, own)
        lines += _tied(index, own)
        lines += _trained_too(index, own, fully_trained)
        lines += _inside_others(index, own)
        lines += _never_called(own, called) if called is not None else ()
        found.append(tuple(lines))
    return tuple(found)


def _of_method(hits: Sequence[Hits]) -> list[str]:
    """The paths of the first of these methods, with those of the parts that go on with it."""
    return [path for part in (hits[0], *takewhile(attrgetter("goes_on"), hits[1:])) for path in part.built]


def called_modules(index: BackboneIndex, inputs: Inputs) -> set[str]:
    """Returns the paths of the modules that a forward with these inputs calls, under each of their names.

    Raises:
        OptionError: if the forward raises an exception.
    """
    modules = {path: module for path, module in index.by_path.items() if index.names[id(module)][0] == path}
    with recorded_calls(modules) as calls:
        trial_call(index.backbone, inputs, where="plan")
    return {name for path, module in modules.items() if calls[path].times for name in index.names[id(module)]}


def holes(index: BackboneIndex, paths: Iterable[str]) -> Iterator[str]:
    """Yields the rows of repeated modules of which only some are hit: `25 of 30 in layers: not {5-29:6}`.

    Names are looked at one by one: queries in all layers do not hide values in some.
    """
    hit: dict[tuple[str, str], dict[str, None]] = {}
    leaves: dict[str, None] = {}
    for path in paths:
        components = index.split(path)[0].split(".")
        leaves[components[-1]] = None
        for place, component in enumerate(components):
            if component.isdecimal():
                row = ".".join(components[:place])
                leaf = components[-1] if place < len(components) - 1 else ""
                hit.setdefault((row, leaf), {})[component] = None
    blocks = set(index.roles.blocks) if hit else set()
    texts: dict[tuple[int, int, str], dict[str, dict[str, None]]] = {}
    for (row, leaf), members in hit.items():
        alike = _alike(index, row, members, blocks)
        missing = [name for name in alike if name not in members]
        if missing:
            left_out = f"{{{span(missing)}}}" if len(missing) > 1 else missing[0]
            key = len(alike) - len(missing), len(alike), left_out
            texts.setdefault(key, {}).setdefault(leaf, {})[row] = None
    for (there, total, left_out), by_leaf in texts.items():
        for rows, names in _by_rows(by_leaf).items():
            # A name is written only where other names of the method have no such hole.
            which = "" if set(names) >= set(leaves) or "" in names else f"{', '.join(names)}: "
            where = ", ".join(row or "the backbone" for row in fold(rows))
            yield f"{which}{there} of {total} in {where}: not {left_out}"


def _by_rows(by_leaf: Mapping[str, Mapping[str, None]]) -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], list[str]] = {}
    for leaf, rows in by_leaf.items():
        found.setdefault(tuple(rows), []).append(leaf)
    return found


def _alike(index: BackboneIndex, row: str, members: Collection[str], blocks: Collection[str]) -> list[str]:
    """The modules in a row that are like those that are hit: all blocks, or else all of the same classes."""
    children = [(name, child) for name, child in own_children(index.by_path[row]) if name.isdecimal()]
    if any(join(row, name) in blocks for name in members):
        return [name for name, _ in children if join(row, name) in blocks]
    kinds = {class_name(child) for name, child in children if name in members}
    return [name for name, child in children if class_name(child) in kinds]


def _overlaps(own: Hits, earlier: Iterable[Hits]) -> Iterator[str]:
    for other in earlier:
        there: dict[str, list[str]] = {}
        for path, module in other.built.items():
            there.setdefault(_owner(path, module), []).append(module.part)
        # Two slices of one projection, or two parameters of one module, have nothing in common.
        both = [
            path
            for path, module in own.built.items()
            if any(
                part == module.part or not are_apart(part, module.part) for part in there.get(_owner(path, module), ())
            )
        ]
        if both:
            yield f"{_number(both, own)} also hit by {other.method.name}: {', '.join(fold(both))}"


def _owner(path: str, module: DeltaModule) -> str:
    return path.removesuffix(module.part).removesuffix(".") if module.part else path


def _attached_already(index: BackboneIndex, own: Hits) -> Iterator[str]:
    for attachment in attachments_of(index.backbone):
        there = {site.path for site in attachment.sites}
        both = [path for path in own.built if path in there]
        if both:
            yield f"{_number(both, own)} hit by delta {attachment.record.name!r} already: {', '.join(fold(both))}"


def _tied(index: BackboneIndex, own: Hits) -> Iterator[str]:
    for path in own.built:
        others = index.target(path).tied
        if others:
            yield f"the weight at {path} is tied to {', '.join(others)}"


def _trained_too(index: BackboneIndex, own: Hits, fully_trained: Collection[str]) -> Iterator[str]:
    held = {"train=": {parent_of(name) for name in fully_trained}}
    for attachment in attachments_of(index.backbone):
        names = attachment.record.fully_trained
        held[f"delta {attachment.record.name!r}"] = {parent_of(name) for name in names}
    for who, modules in held.items():
        both = [path for path, module in own.built.items() if _owner(path, module) in modules]
        if both:
            yield f"{_number(both, own)} trained fully by {who}: {', '.join(fold(both))}"


def _inside_others(index: BackboneIndex, own: Hits) -> Iterator[str]:
    """Another library's delta: PEFT keeps a layer as `base_layer`, and its own parts beside it."""
    inside = [path for path in own.built if _is_of_peft(index.by_path, index.split(path)[0])]
    if inside:
        yield f"{_number(inside, own)} inside a delta of PEFT: {', '.join(fold(inside))}"


def _is_of_peft(modules: Mapping[str, nn.Module], path: str) -> bool:
    return any(
        parent in modules and wrapped_layer(modules[parent]) is not None and name.rpartition(".")[2] != "base_layer"
        for name in above(path)
        if name
        for parent in (parent_of(name),)
    )


def _never_called(own: Hits, called: Collection[str]) -> Iterator[str]:
    idle = []
    for path, module in own.built.items():
        read = module.weight_read
        runs = _owner(path, module) in called
        if read is not None:
            # A weight patch takes effect in the forward around it.
            runs = any(one.scope in called for one in (read, *read.also))
        if not runs and module.must_be_called:
            idle.append(path)
    if idle:
        yield f"{_number(idle, own)} never called with these inputs: {', '.join(fold(idle))}"


def _number(paths: Sequence[str], own: Hits) -> str:
    count = "all" if len(paths) == len(own.built) else str(len(paths))
    return f"{count} {'is' if len(paths) == 1 and count != 'all' else 'are'}"
