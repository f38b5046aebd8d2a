"""The verbs of the main path: `attach` methods to a backbone, `load` a saved delta onto one."""

import time
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

from torch import Tensor, nn

from deltakit.core import (
    Attachment,
    DeltaModule,
    Method,
    Record,
    Selector,
    Site,
    attachments_of,
    records_of,
    tensors_of,
)
from deltakit.delta.full_training import current_values
from deltakit.delta.handle import Delta
from deltakit.delta.planning import Plan, build, original, plan
from deltakit.errors import BackboneMismatch, CheckpointError, DeltaWarning, OptionError, StateError
from deltakit.files import backbone_identity, differences, expanded, find_folder, methods_of, read_folder
from deltakit.selection import BackboneIndex

AUTOMATIC_NAME = "delta"


def attach(
    backbone: nn.Module, *methods: Method, name: str | None = None, train: Selector = (), freeze: bool = True
) -> Delta:
    """The delta that these methods make on the backbone, attached, active and trainable; all else is frozen.

    Args:
        name: the delta's name among those on this backbone; needed only to stack a method on another of its kind.
        train: selectors of backbone modules that are trained whole and belong to the delta, such as "@head".
        freeze: whether the backbone's own parameters stop asking for gradients until the delta is detached.

    Raises:
        SelectorError: if a selector picks nothing; nearest paths are named.
        RoleError: if a default position is not found on this backbone.
        TargetError: if a method cannot serve a module that was picked.
        OptionError: if there is no method, or an option does not fit a target.
        StateError: if the name is taken, or the same method is at one of the targets already.
    """
    planned = plan(backbone, *methods, train=train)
    _refuse_stacking(planned, name)
    record = _record(planned.backbone, planned.methods, name, freeze, planned.train)
    record.trained_values = current_values(planned.backbone, planned.fully_trained, record)
    return Delta(Attachment(planned.backbone, record, _sites(planned.index, planned.built))).attach()


def load(
    source: str | PathLike[str],
    backbone: nn.Module,
    *,
    name: str | None = None,
    freeze: bool = True,
    attach: bool = True,
    check: Literal["error", "warn"] = "error",
    revision: str | None = None,
    token: str | bool | None = None,
) -> Delta:
    """The delta saved in a folder or a Hub repository, attached to the backbone as it was when it was saved.

    Args:
        attach: whether to attach it now; a delta that waits costs nothing in forwards, and is attached by its `attach()`.
        check: what to do when the backbone is not the one that the delta was trained on.
        revision: a branch, tag or commit of the repository.

    Raises:
        CheckpointError: if there is no delta, it is damaged, or its tensors do not fit; nothing is changed then.
        BackboneMismatch: if the backbone differs from the one that the delta was trained on.
        HubError: if the repository cannot be read.
    """
    backbone = original(backbone)
    index = BackboneIndex(backbone)
    folder = find_folder(source, revision=revision, token=token)
    # Other formats enter here: what is in the folder says which reader turns it into a config and tensors.
    config, tensors = read_folder(folder)
    where = str(source)
    _check_backbone(config, backbone, where, check)
    found = methods_of(config)
    for _, paths in found:
        _check_paths(index, paths, where)
    built = [_rebuilt(index, method, paths, where) for method, paths in found]
    record = _record(backbone, [m for m, _ in found], name or config["name"], freeze, config["train"]["selectors"])
    full = expanded(config["train"]["names"])
    _check_paths(dict(tensors_of(backbone)), full, where)
    record.trained_values = current_values(backbone, full, record)
    delta = Delta(Attachment(backbone, record, _sites(index, built)))
    delta.load_state_dict(tensors, where=where)
    return delta.attach() if attach else delta


def new_delta(backbone: nn.Module, methods: Sequence[Method], name: str | None, sites: list[Site]) -> Delta:
    """The handle of delta modules that were made and not attached."""
    return Delta(Attachment(backbone, _record(backbone, methods, name, True, ()), sites))


def _record(backbone: nn.Module, methods: Any, name: str | None, freeze: bool, train: Any) -> Record:
    if name is not None and (not name or "." in name):
        raise OptionError(f"name={name!r}: expected a word without dots, for it becomes part of parameters' names")
    # The order of first attachment must hold between deltas that were never attached at one time: so it is a clock.
    order = max([time.time_ns(), *(record.order + 1 for record in records_of(backbone))])
    return Record(name or AUTOMATIC_NAME, tuple(methods), order, freeze, named=name is not None, train=tuple(train))


def _sites(index: BackboneIndex, built: Any) -> list[Site]:
    return [
        Site(path, index.module_at(path)[0], module, number)
        for number, of_method in enumerate(built)
        for path, module in of_method.items()
    ]


def _rebuilt(index: BackboneIndex, method: Method, paths: Sequence[str], where: str) -> dict[str, DeltaModule]:
    """The delta modules of a saved method, at exactly the paths that its file names."""
    built = build(index, method, [index.target(path) for path in paths])
    other = sorted(built.keys() ^ set(paths))
    if other:
        raise CheckpointError(
            f"{where}: {method.name} stands at {len(paths)} places in the file, and would stand at {len(built)} here; they "
            f"differ at {other[0]}; was it trained on another backbone?"
        )
    return built


def _refuse_stacking(planned: Plan, name: str | None) -> None:
    if name is not None:
        return
    taken = {
        (site.path, other.record.methods[site.method].name): other.record.name
        for other in attachments_of(planned.backbone)
        for site in other.sites
    }
    for method, built in zip(planned.methods, planned.built, strict=True):
        for path in built:
            if (path, method.name) in taken:
                raise StateError(
                    f"{path}: delta {taken[path, method.name]!r} has a {method.name} there already; detach() that one "
                    "first, or give this one a name= to put it on top"
                )


def _check_backbone(config: Mapping[str, Any], backbone: nn.Module, where: str, check: str) -> None:
    if check not in ("error", "warn"):
        raise OptionError(f"check={check!r}: expected 'error' or 'warn'")
    other = differences(config["backbone"]["fingerprint"], backbone_identity(backbone)["fingerprint"])
    if not other:
        return
    message = f"{where}: this is not the backbone the delta was trained on: {other[0]}"
    if check == "error":
        raise BackboneMismatch(f"{message}; load that one, or pass check='warn' if you mean it")
    warnings.warn(message, DeltaWarning, stacklevel=3)


def _check_paths(known: BackboneIndex | Mapping[str, Tensor], paths: list[str], where: str) -> None:
    missing = [path for path in paths if path not in known]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of its {len(paths)} places are not in this backbone, such as {missing[0]}; "
            "was it trained on another one?"
        )
