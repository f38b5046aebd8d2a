"""Methods that weigh other deltas: where these are, and that they are there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deltakit.core import BackboneView, DeltaModule, Method, Site, Target, above, attachments_of
from deltakit.errors import OptionError, TargetError, no_such_delta
from deltakit.ops.kinds.weighing import Weighing


@dataclass(frozen=True, kw_only=True)
class WeighingMethod(Method):
    """A method whose delta modules are `Weighing`, and are built from a target and the method itself.

    By default its targets are those of the weighed deltas. `at=` selects some of them, or modules around them.

    Args:
        deltas: the names of the weighed deltas, at least two. They are attached to the same backbone before it, under names
            of their own (`attach(..., name=)`), and are not active while it is.
    """

    identity: ClassVar[bool] = False
    example: ClassVar[Mapping[str, Any]] = {"deltas": ("a", "b")}

    deltas: Sequence[str]

    def validate(self) -> None:
        names = tuple(self.deltas)
        if len(names) < 2 or len(set(names)) < len(names):
            raise OptionError(
                f"{type(self).__name__}(deltas={list(names)!r}): expected the names of at least two deltas, each once, such "
                "as deltas=('a', 'b')"
            )
        object.__setattr__(self, "deltas", names)

    @property
    def weighed(self) -> tuple[str, ...]:
        return tuple(self.deltas)

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        sites = self._sites(index)
        if selected is None:
            return [index.target(path) for path in sites]
        chosen: dict[str, Target] = {}
        for target in selected:
            inside = [path for path, site in sites.items() if _holds(target, site)]
            if not inside:
                raise TargetError(
                    f"{target.named}: none of the deltas {', '.join(self.deltas)} has a delta module here; select some of "
                    f"their targets, such as at={next(iter(sites))!r}, or omit at= for all"
                )
            chosen.update({path: index.target(path) for path in inside})
        return list(chosen.values())

    def kind_at(self, target: Target) -> type[DeltaModule] | None:
        # Where a weight is patched, the error of `Weighing` says whose patch it is.
        return self.kind

    def build_at(self, target: Target) -> DeltaModule:
        build: Any = self.kind
        module: DeltaModule = build(target, self)
        return module

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        # A load comes here without asking for targets.
        self._sites(index)
        built = super().build(index, targets)
        told: set[str] = set()
        for module in built.values():
            if isinstance(module, Weighing):
                module.told = told
        return built

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> Method:
        raise TargetError(
            f"{cls.__name__} is not linear in its parameters, so it has no weighted sums; run the deltas one by one"
        )

    def _sites(self, index: BackboneView) -> dict[str, Site]:
        """Returns the sites of the weighed deltas by path.

        Raises:
            OptionError: if a delta of these names is not attached, or got its name automatically.
        """
        attached = {attachment.record.name: attachment for attachment in attachments_of(index.backbone)}
        found: dict[str, Site] = {}
        for name in self.deltas:
            if name not in attached:
                raise no_such_delta(type(self).__name__, name, attached)
            if not attached[name].record.named:
                raise OptionError(
                    f"{type(self).__name__}: delta {name!r} was attached without name=, so that its name may change when it "
                    "is attached again; attach or load it with a name= of its own"
                )
            found.update({site.path: site for site in attached[name].sites})
        return found


def _holds(target: Target, site: Site) -> bool:
    """Returns whether a site is at a target, or in it if the target is a module."""
    return site.path == target.path or (not target.part and target.path in above(site.owner))
