"""What would be attached: the targets and delta modules of some methods, built and not yet put into the backbone."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from deltakit.core import FROZEN, DeltaModule, Method, Selector, Target, WeightRead, is_sharded, own_parameters
from deltakit.delta.full_training import full_training_names
from deltakit.errors import OptionError, StateError, TargetError
from deltakit.selection import BackboneIndex, find_targets
from deltakit.view import Line, report, share


@dataclass(frozen=True)
class Plan:
    """For each method its targets and the delta modules built for them, and the names of what is trained whole."""

    backbone: nn.Module
    methods: tuple[Method, ...]
    built: tuple[dict[str, DeltaModule], ...]
    left_out: tuple[tuple[Target, ...], ...]
    train: tuple[str, ...]
    fully_trained: tuple[str, ...]
    index: BackboneIndex

    @property
    def paths(self) -> dict[str, list[str]]:
        """The paths of the targets of each method, by the method's name."""
        paths: dict[str, list[str]] = {}
        for method, built in zip(self.methods, self.built, strict=True):
            paths.setdefault(method.name, []).extend(built)
        return paths

    @property
    def num_parameters(self) -> int:
        """How many parameters of the delta modules would be trained, those of fully trained modules not counted."""
        return sum(parameter.numel() for built in self.built for parameter in _parameters(built))

    def __repr__(self) -> str:
        lines = [
            Line(
                method.name,
                next(iter(built.values())).summary(),
                list(built),
                sum(p.numel() for p in _parameters(built)),
                [path for path, module in built.items() if module.weight_read is not None],
                [target.path for target in left_out],
                [alias for path in built for alias in self.index.target(path).aliases],
            )
            for method, built, left_out in zip(self.methods, self.built, self.left_out, strict=True)
        ]
        own = dict(own_parameters(self.backbone))
        total = sum(parameter.numel() for parameter in own.values())
        count = self.num_parameters
        return report(
            f"plan for {self.index.owner}",
            lines,
            {name: own[name] for name in self.fully_trained if name in own},
            f"nothing is changed; +{count:,} parameters, {share(count, total)} of {total:,}",
        )


def plan(backbone: nn.Module, *methods: Method, train: Selector = ()) -> Plan:
    """What `attach` with the same arguments would attach, printed by its `repr`; nothing is changed.

    Raises:
        SelectorError: if a selector picks nothing.
        RoleError: if a default position is not found on this backbone.
        TargetError: if a method cannot serve a module that was picked.
        OptionError: if there is no method, or an option does not fit a target.
    """
    index = BackboneIndex(original(backbone))
    if isinstance(index.backbone, DeltaModule):
        raise TargetError(
            "the backbone is itself a delta module: deltas are not nested; attach to the model it sits on"
        )
    if not methods:
        raise OptionError("no method given: expected at least one, such as LoRA(r=8)")
    for method in methods:
        if not isinstance(method, Method):
            raise OptionError(f"expected methods such as LoRA(r=8), found {method!r}")
    built, left_out = [], []
    for method in methods:
        targets, unserved = find_targets(index, method)
        built.append(build(index, method, targets))
        left_out.append(tuple(unserved))
    _refuse_twice(methods, built)
    selectors = (train,) if isinstance(train, str) else tuple(train)
    full = full_training_names(index.backbone, index.select(selectors)) if selectors else []
    return Plan(index.backbone, methods, tuple(built), tuple(left_out), selectors, tuple(full), index)


def _refuse_twice(methods: Sequence[Method], built: Sequence[dict[str, DeltaModule]]) -> None:
    seen: set[tuple[str, str]] = set()
    for method, of_method in zip(methods, built, strict=True):
        for path in of_method:
            if (path, method.name) in seen:
                raise OptionError(
                    f"{path}: two of the methods given are {method.name} and both pick this; leave it out of one with "
                    "exclude=, or attach the second one as a delta of its own with another name="
                )
            seen.add((path, method.name))


def build(index: BackboneIndex, method: Method, targets: Sequence[Target]) -> dict[str, DeltaModule]:
    """The delta modules of a method for its targets, by their paths; each knows its place and where it is read.

    Raises:
        TargetError: if the method cannot serve a target.
        OptionError: if an option does not fit a target.
    """
    for target in targets:
        if method.kind_at(target) is None:
            raise TargetError(_unserved(method, target))
    built = method.build(index, targets)
    at = {target.path: target for target in targets}
    for path, module in built.items():
        target = at.get(path) or index.target(path)
        module.part = target.part
        if type(module).patches_weight(target):
            module.weight_read = target.weight_read or WeightRead(target.owner, "")
        for name, parameter in module.named_parameters():
            if module.tag_of(name) == FROZEN:
                parameter.requires_grad_(False)
    return built


def original(backbone: nn.Module) -> nn.Module:
    """The user's model inside what `torch.compile` returned; any other module is itself.

    Raises:
        StateError: if it is wrapped for distribution already: gradients of deltas attached now would stay local.
    """
    backbone = getattr(backbone, "_orig_mod", backbone)
    if not isinstance(backbone, nn.Module):
        return backbone
    spread = next((name for name, parameter in backbone.named_parameters() if is_sharded(parameter)), None)
    names = {kind.__name__ for module in backbone.modules() for kind in type(module).__mro__}
    for wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"):
        if wrapper in names:
            raise StateError(
                f"the backbone is wrapped in {wrapper} already: gradients of deltas attached now would not be "
                "synchronised; attach to the plain model first and wrap it afterwards"
            )
    if spread is not None:
        raise StateError(
            f"{spread} is spread over processes already (tensor parallelism?): deltas on such weights are not supported; "
            "load the model without a tp_plan, attach, and shard it with fully_shard"
        )
    return backbone


def _unserved(method: Method, target: Target) -> str:
    if target.parameter:
        return (
            f"{target.path}: this is a parameter, and {method.name} has nothing to patch there (it changes what a module "
            "takes or returns, or adds to a bias); name a module, or leave this out with exclude="
        )
    scope = target.weight_read.scope if target.weight_read is not None else ""
    return (
        f"{target.path}: the module around it reads this module's weight directly and never calls it, and {method.name} has "
        f"nothing to patch there; name '{scope or '^'}', or leave this one out with exclude="
    )


def _parameters(built: dict[str, DeltaModule]) -> Sequence[nn.Parameter]:
    return [parameter for module in built.values() for _, parameter, _ in module.trained_parameters()]
