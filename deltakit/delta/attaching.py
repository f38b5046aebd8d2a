"""`attach` adds methods to a backbone, and `load` adds a saved delta."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from typing import Any, Literal

from torch import nn

from deltakit.core import (
    Attachment,
    Method,
    Record,
    Selector,
    Site,
    checked,
    one_walk,
    same_random_numbers,
    tensors_of,
)
from deltakit.delta.full_training import current_values
from deltakit.delta.handle import Delta
from deltakit.delta.new_heads import warn_frozen_head
from deltakit.delta.planning import original, planned
from deltakit.delta.rebuilding import check_paths, has_its_tensors, placed, rebuilt
from deltakit.delta.untrained import start_of
from deltakit.errors import BackboneMismatch, CheckpointError, OptionError, warn
from deltakit.files import (
    Access,
    backbone_identity,
    differences,
    expanded,
    find_folder,
    from_file,
    methods_of,
    read_saved,
    room_for,
)
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
    with same_random_numbers(only_after_errors=True):
        plan = planned(backbone, methods, train)
        with one_walk(plan.backbone):
            record = _record(plan.methods, name, freeze, plan.train)
            record.left_out = tuple(found.left_out for found in plan.found)
            record.notes = tuple(found.note for found in plan.found)
            record.trained_values = current_values(plan.backbone, plan.fully_trained, record)
            if freeze and (train is None or plan.train):
                warn_frozen_head(plan.index, plan.fully_trained, plan.train)
            attachment = Attachment(plan.backbone, record, _sites(plan.index, plan.built))
            record.start = start_of(attachment)
            return Delta(attachment).attach()


@checked
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
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Delta:
    """Loads a delta from a folder or a Hub repository, attaches it to the backbone, and returns it.

    It reads deltas that deltakit saved, and adapters that PEFT saved: LoRA, AdaLoRA, IA3, prompts and prefixes.

    Args:
        source: the folder, or the repository as "owner/name".
        name: the delta's name; by default the one that it was saved with. One of the two is required to put a method on a
            target that has the same method from another delta.
        freeze: whether to freeze the backbone's own parameters. They stay frozen as long as such a delta is attached; after
            the last one they require gradients as before. With False the delta leaves them as they are, and `print(delta)`
            says how many of them are trained without being saved.
        attach: whether to attach it now. A delta that is loaded but not attached costs nothing in forwards; its `attach()`
            attaches it later.
        check: "error" or "warn" if the backbone is not the one that the delta was trained on. Adapters of PEFT do not say.
        revision: a branch, tag or commit of the repository.
        token: the Hub's access token; by default the one of `hf auth login`.
        cache_dir: where downloads are kept; by default the Hub's own cache.
        local_files_only: whether to read the cache alone, without asking the Hub.

    Raises:
        CheckpointError: if there is no delta, it is damaged, its methods cannot be built on this backbone, or its tensors do
            not fit. Nothing is changed then.
        BackboneMismatch: if the backbone differs from the one that the delta was trained on.
        HubError: if the repository cannot be read.
        OptionError: if `check` or `name` has a wrong value.
        StateError: if the name is taken, the delta has no name and a target has the same method already, the backbone is
            wrapped for distribution or is in a `rows` block, or another delta fully trains the same parameters or is merged
            into them.
    """
    backbone = original(backbone)
    index = BackboneIndex(backbone)
    folder = find_folder(source, Access(revision, token, cache_dir, local_files_only))
    own = dict(tensors_of(backbone))
    where = str(source)
    saved = placed(index, read_saved(folder, backbone), where)
    if saved.fingerprint is not None:
        _check_backbone(saved.fingerprint, backbone, where, check)
    limit = room_for([*index.by_path, *own])
    found = methods_of(saved.methods, index, limit, where)
    with from_file(where, "train.names"):
        full = expanded(saved.train.names, own, limit)
    check_paths(own, full, where)
    with nullcontext() if name is not None else from_file(where, "name"):
        name = name if name is not None else saved.name
        record = _record([m for m, _ in found], name, freeze, saved.train.selectors)
    built = []
    for number, (method, paths) in enumerate(found):
        built.append(rebuilt(index, method, paths, saved.tensors, where))
        if number + 1 < len(found) and not has_its_tensors(record, number, built[-1], saved.tensors):
            # `load_state_dict` lists what is missing.
            break
    record.trained_values = current_values(backbone, full, record)
    sites = _sites(index, built)
    if saved.fingerprint is None:
        _refuse_unseen(sites, where)
    delta = Delta(Attachment(backbone, record, sites))
    delta.load_state_dict(saved.tensors, where=where)
    return delta.attach() if attach else delta


def _refuse_unseen(sites: Sequence[Site], where: str) -> None:
    """Refuses an adapter of others at a module that is never called: there it did nothing, and a weight patch would.

    Raises:
        CheckpointError: if there is one.
    """
    for site in sites:
        if site.module.target_never_called:
            raise CheckpointError(
                f"{where}: the module around {site.path} reads its weight directly, so the adapter has no effect there in the "
                "library that saved it; attach a new delta"
            )


def new_delta(backbone: nn.Module, methods: Sequence[Method], name: str | None, sites: list[Site]) -> Delta:
    """Returns the handle of a new delta with these modules, not attached."""
    return Delta(Attachment(backbone, _record(methods, name, True, ()), sites))


def _record(methods: Any, name: str | None, freeze: bool, train: Any) -> Record:
    if name is not None and (not isinstance(name, str) or not name or not name.isprintable() or set(name) & {".", " "}):
        raise OptionError(
            f"name={name!r}: expected a word without dots, spaces and control characters, because it becomes part of "
            "parameter names; write '_' instead"
        )
    return Record(name or AUTOMATIC_NAME, tuple(methods), 0, freeze, named=name is not None, train=tuple(train))


def _sites(index: BackboneIndex, built: Any) -> list[Site]:
    return [
        Site(path, index.module_at(path)[0], module, number)
        for number, of_method in enumerate(built)
        for path, module in of_method.items()
    ]


def _check_backbone(fingerprint: Mapping[str, Any], backbone: nn.Module, where: str, check: str) -> None:
    found = backbone_identity(backbone)["fingerprint"]
    with from_file(where, "backbone.fingerprint"):
        other = differences(fingerprint, found)
    if not other:
        return
    message = f"{where}: this is not the backbone the delta was trained on: {other[0]}"
    if check == "error":
        raise BackboneMismatch(f"{message}; load that backbone, or pass check='warn' to load the delta all the same")
    warn(message)
