"""Plan: the targets and delta modules that `attach` would add, built but not attached."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from deltakit.core import (
    FROZEN,
    DeltaModule,
    Inputs,
    Method,
    Selector,
    Target,
    WeightRead,
    checked,
    collections_paused,
    fold,
    is_sharded,
    join,
    normal_tensors,
    notebook_bundle,
    num_parameters,
    one_walk,
    own_modules,
    own_parameters,
    parameters_of,
    without_start_values,
)
from deltakit.delta.full_training import full_training_names
from deltakit.delta.plan_remarks import Hits, called_modules, remarks
from deltakit.errors import OptionError, StateError, TargetError, encodable
from deltakit.selection import BackboneIndex, Found, OptionSelectors, find_targets
from deltakit.view import Line, binary_size, report, share


@checked
@dataclass(frozen=True)
class Plan:
    """What `attach` would do: the delta modules of each method by target, and the names of fully trained parameters.

    `found`: for each method the paths of its targets, what it leaves out and why, and what is unusual about the choice.
    `remarks`: for each method what may be a mistake, such as layers that it leaves out.
    """

    backbone: nn.Module
    methods: tuple[Method, ...]
    built: tuple[dict[str, DeltaModule], ...]
    found: tuple[Found, ...]
    train: tuple[str, ...]
    fully_trained: tuple[str, ...]
    index: BackboneIndex
    remarks: tuple[tuple[str, ...], ...] = ()

    @property
    def paths(self) -> dict[str, list[str]]:
        """The paths of the targets of each method, by the method's name."""
        paths: dict[str, list[str]] = {}
        for method, built in zip(self.methods, self.built, strict=True):
            paths.setdefault(method.name, []).extend(built)
        return paths

    @property
    def num_parameters(self) -> int:
        """The number of trained parameters of the delta modules, without fully trained modules."""
        return sum(parameter.numel() for built in self.built for parameter in _parameters(built))

    @property
    def num_bytes(self) -> int:
        """The size of these parameters."""
        return sum(parameter.nbytes for built in self.built for parameter in _parameters(built))

    def to_dict(self) -> dict[str, Any]:
        """Returns its contents as data that `json.dumps` takes."""
        return {
            "model": self.index.owner,
            "methods": [
                {
                    "name": line.method,
                    "summary": line.summary,
                    "paths": list(line.paths),
                    "where": list(fold(line.paths)),
                    "parameters": line.parameters,
                    "left_out": dict(line.left_out),
                    "note": line.note,
                    "remarks": list(line.remarks),
                }
                for line in self._lines()
            ],
            "fully_trained": list(self.fully_trained),
            "parameters": self.num_parameters,
            "bytes": self.num_bytes,
            "of": num_parameters(self.backbone),
        }

    def _lines(self) -> list[Line]:
        told = self.remarks or ((),) * len(self.methods)
        return [
            Line(
                method.name,
                next(iter(built.values())).summary(),
                list(built),
                sum(p.numel() for p in _parameters(built)),
                [path for path, module in built.items() if module.weight_read is not None],
                found.left_out,
                [alias for path in built for alias in self.index.target(path).aliases],
                found.note,
                remarks=told_here,
            )
            for method, built, found, told_here in zip(self.methods, self.built, self.found, told, strict=True)
        ]

    def __repr__(self) -> str:
        own = dict(own_parameters(self.backbone))
        total = num_parameters(self.backbone)
        count = self.num_parameters
        text = report(
            f"plan for {self.index.owner}",
            self._lines(),
            {name: own[name] for name in self.fully_trained if name in own},
            f"nothing is changed; +{count:,} parameters ({binary_size(self.num_bytes)}), {share(count, total)} of {total:,}",
            total,
        )
        return encodable(text)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_bundle(repr(self))


@checked
def plan(backbone: nn.Module, *methods: Method, train: Selector | None = None, inputs: Inputs | None = None) -> Plan:
    """Returns what `attach` with the same arguments would do. Print it to see the targets. Nothing is changed.

    No random number generator changes, either: the delta modules of a plan have no start values.

    Lines with `!` say what may be a mistake: layers without a target (`25 of 30 in layers: not {5-29:6}`), a target that two
    methods or another delta hit, a tied weight, and with `inputs=` what a forward does not call.

    Args:
        methods: what to attach, such as `LoRA(r=8)`; at least one.
        train: selectors of backbone modules that would be trained fully.
        inputs: what the model is called with, for one forward in its current mode without gradients: a tensor, a list of
            arguments, or a dictionary of named ones. Buffers stay as they are.

    Raises:
        SelectorError: if a selector is malformed or matches nothing. The message lists similar paths.
        RoleError: if a default position is not found on this backbone, or a role does not exist.
        TargetError: if a method cannot be used on a target.
        OptionError: if no method is given, an option does not fit a target, or the forward fails with these inputs.
        StateError: if the backbone is wrapped for distribution, or a weight in `train` is tied to one outside, quantized or
            offloaded.
    """
    with without_start_values(), collections_paused():
        found = planned(backbone, methods, train)
    hits = [
        # What was found is with the first part of a method alone.
        Hits(method, built, goes_on=not how.paths)
        for method, built, how in zip(found.methods, found.built, found.found, strict=True)
    ]
    called = called_modules(found.index, inputs) if inputs is not None else None
    with one_walk(found.backbone):
        return replace(found, remarks=remarks(found.index, hits, found.fully_trained, called))


def planned(backbone: nn.Module, methods: tuple[Method, ...], train: Selector | None) -> Plan:
    """Returns the plan of these methods. Outside of `without_start_values` its delta modules are ready to be attached.

    Raises:
        DeltaError: as `plan` does.
    """
    backbone = original(backbone)
    with one_walk(backbone) if isinstance(backbone, nn.Module) else nullcontext():
        return _planned(BackboneIndex(backbone), methods, train)


def _planned(index: BackboneIndex, methods: tuple[Method, ...], train: Selector | None) -> Plan:
    if isinstance(index.backbone, DeltaModule):
        raise TargetError(
            "the backbone is itself a delta module, and deltas cannot be nested; attach to the model that it belongs to"
        )
    if not methods:
        raise OptionError("no method given: expected at least one; write attach(model, LoRA(r=8)), for example")
    own, built, found = list[Method](), [], []
    for method in methods:
        targets, how = find_targets(index, method)
        for part, of_part in OptionSelectors(index, method).apart(targets):
            own.append(part)
            built.append(build(index, part, of_part))
            found.append(how)
            # What was left out is the same for all parts, and is said once.
            how = Found()
    _refuse_twice(own, built)
    selectors = (train,) if isinstance(train, str) else tuple(train or ())
    full = full_training_names(index.backbone, index.select(selectors)) if selectors else []
    return Plan(index.backbone, tuple(own), tuple(built), tuple(found), selectors, tuple(full), index)


def _refuse_twice(methods: Sequence[Method], built: Sequence[dict[str, DeltaModule]]) -> None:
    seen: set[tuple[str, str]] = set()
    for method, of_method in zip(methods, built, strict=True):
        for path in of_method:
            if (path, method.name) in seen:
                raise OptionError(
                    f"{path}: two of the given methods are {method.name} and both select this target; leave it out of one "
                    "with exclude=, or attach the second one as a delta of its own with another name="
                )
            seen.add((path, method.name))


def build(index: BackboneIndex, method: Method, targets: Sequence[Target]) -> dict[str, DeltaModule]:
    """Returns the delta modules of a method by the paths of their targets, ready to be attached.

    Raises:
        TargetError: if the method cannot be used on a target.
        OptionError: if an option does not fit a target.
    """
    for target in targets:
        if method.kind_at(target) is None:
            raise TargetError(_unserved(method, target))
    with normal_tensors():
        built = method.build(index, targets)
    at = {target.path: target for target in targets}
    for path, module in built.items():
        target = at.get(path) or index.target(path)
        if target.part:
            module.part = target.part
        if type(module).patches_weight(target):
            module.weight_read = target.weight_read or WeightRead(target.owner, "")
        for name, parameter in parameters_of(module).items():
            if module.tag_of(name) == FROZEN:
                parameter.requires_grad_(False)
    return built


def original(backbone: nn.Module) -> nn.Module:
    """Returns the user's model inside the result of `torch.compile`; any other module is returned itself.

    Raises:
        StateError: if the model is wrapped for distribution already, because gradients of deltas that are attached then
            are not synchronised.
    """
    backbone = getattr(backbone, "_orig_mod", backbone)
    if not isinstance(backbone, nn.Module):
        return backbone
    kinds: set[type] = set()
    sharded = None
    for path, module in own_modules(backbone):
        kinds.add(type(module))
        for name, parameter in module._parameters.items():
            if sharded is None and parameter is not None and is_sharded(parameter):
                sharded = join(path, name)
    names = {kind.__name__ for of in kinds for kind in of.__mro__}
    for wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"):
        if wrapper in names:
            raise StateError(
                f"the backbone is wrapped in {wrapper} already, so gradients of deltas attached now would not be "
                "synchronised; attach to the plain model first and wrap it afterwards"
            )
    if sharded is not None:
        raise StateError(
            f"{sharded} is sharded over processes already (by tensor parallelism?), which is not supported; load the model "
            "without a tp_plan, attach, and shard it with fully_shard"
        )
    return backbone


def _unserved(method: Method, target: Target) -> str:
    if target.parameter:
        return (
            f"{target.path}: this is a parameter, and {method.name} has nothing to patch there (it changes the input or "
            "output of a module, or adds to a bias); select a module, or leave this out with exclude="
        )
    scope = target.weight_read.scope if target.weight_read is not None else ""
    return (
        f"{target.path}: the module around it reads this module's weight directly and never calls it, and {method.name} has "
        f"nothing to patch there; write at='{scope or '^'}', or leave this one out with exclude="
    )


def _parameters(built: dict[str, DeltaModule]) -> Sequence[nn.Parameter]:
    return [parameter for module in built.values() for _, parameter, _ in module.trained_parameters()]
