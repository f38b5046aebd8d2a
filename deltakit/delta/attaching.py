"""`attach` adds methods to a backbone."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from deltakit.core import (
    Attachment,
    DeltaModule,
    Method,
    Record,
    Selector,
    Site,
    checked,
    collections_paused,
    one_walk,
    same_random_numbers,
)
from deltakit.delta.full_training import current_values
from deltakit.delta.handle import Delta
from deltakit.delta.new_heads import warn_frozen_head
from deltakit.delta.planning import planned
from deltakit.delta.untrained import start_of
from deltakit.errors import OptionError
from deltakit.selection import BackboneIndex

AUTOMATIC_NAME = "delta"


@checked
def attach(
    backbone: nn.Module, *methods: Method, name: str | None = None, train: Selector | None = None, freeze: bool = True
) -> Delta:
    """Attaches methods to a backbone and returns the delta: attached, active and trainable.

    Args:
        methods: what to attach, such as `LoRA(r=8)`; at least one.
        name: the delta's name among those on this backbone. It is only required to put a method on a target that has the
            same method from another delta.
        train: selectors of backbone modules that are trained fully and saved with the delta, such as "@head". A warning names
            what is new in the backbone, such as a head, and would stay frozen with random weights; `train=()` says that this
            is intended.
        freeze: whether to freeze the backbone's own parameters. They stay frozen as long as such a delta is attached; after
            the last one they require gradients as before. With False the delta leaves them as they are, and `print(delta)`
            says how many of them are trained without being saved.

    Raises:
        SelectorError: if a selector is malformed or matches nothing. The message lists similar paths.
        RoleError: if a default position is not found on this backbone, or a role does not exist.
        TargetError: if a method cannot be used on a target.
        OptionError: if no method is given, an option does not fit a target, or `name` is not a word without dots.
        StateError: if the name is taken, a target has the same method already, a delta is attached to a part of the backbone
            or to a model around it, the backbone is wrapped for distribution or in a `rows` block, or a weight in `train` is
            tied to one outside, quantized, offloaded, fully trained by another delta, or has another delta merged into it.
    """
    with same_random_numbers(only_after_errors=True), collections_paused():
        plan = planned(backbone, methods, train)
        with one_walk(plan.backbone):
            record = new_record(plan.methods, name, freeze, plan.train)
            record.left_out = tuple(found.left_out for found in plan.found)
            record.notes = tuple(found.note for found in plan.found)
            record.trained_values = current_values(plan.backbone, plan.fully_trained, record)
            if freeze and (train is None or plan.train):
                warn_frozen_head(plan.index, plan.fully_trained, plan.train)
            attachment = Attachment(plan.backbone, record, sites_of(plan.index, plan.built))
            record.start = start_of(attachment)
            return Delta(attachment).attach()


def new_delta(backbone: nn.Module, methods: Sequence[Method], name: str | None, sites: list[Site]) -> Delta:
    """Returns the handle of a new delta with these modules, not attached."""
    return Delta(Attachment(backbone, new_record(methods, name, True, ()), sites))


def new_record(methods: Iterable[Method], name: str | None, freeze: bool, train: Iterable[str]) -> Record:
    """Returns the record of a new delta.

    Raises:
        OptionError: if the name is not a word without dots.
    """
    if name is not None and (not isinstance(name, str) or not name or not name.isprintable() or set(name) & {".", " "}):
        raise OptionError(
            f"name={name!r}: expected a word without dots, spaces and control characters, because it becomes part of "
            "parameter names; write '_' instead"
        )
    return Record(name or AUTOMATIC_NAME, tuple(methods), 0, freeze, named=name is not None, train=tuple(train))


def sites_of(index: BackboneIndex, built: Iterable[Mapping[str, DeltaModule]]) -> list[Site]:
    """Returns the sites of the delta modules that were built for each method."""
    return [
        Site(path, index.module_at(path)[0], module, number)
        for number, of_method in enumerate(built)
        for path, module in of_method.items()
    ]
