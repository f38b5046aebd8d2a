"""Builds and reads `delta_config.json`: the methods and their targets, the fully trained modules, and the backbone."""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import product
from math import prod
from typing import Any, Protocol, runtime_checkable

from torch import nn

from deltakit.core import Attachment, Method, Record, breadth, class_name, expand, fold, records_of
from deltakit.errors import SelectorError
from deltakit.files.fingerprint import fingerprint
from deltakit.files.repository import hub_id
from deltakit.files.schema import FORMAT_VERSION, MethodEntry, from_file, read_method
from deltakit.version import __version__


@runtime_checkable
class Paths(Protocol):
    """The paths of a backbone, or some of them."""

    def __contains__(self, path: str, /) -> bool: ...


def delta_config(attachment: Attachment, num_parameters: int) -> dict[str, Any]:
    """Returns the config of a delta as plain data, with the selectors as written and the paths that they matched."""
    backbone, record = attachment.backbone, attachment.record
    methods = [
        {**method.to_dict(), "targets": compact([site.path for site in attachment.sites if site.method == index])}
        for index, method in enumerate(record.methods)
    ]
    details = getattr(backbone, "config", None)
    return {
        "format_version": FORMAT_VERSION,
        "deltakit_version": __version__,
        "name": record.name if record.named else None,
        "methods": methods,
        "train": {"selectors": list(record.train), "names": compact(record.fully_trained)},
        "backbone": {
            "id": hub_id(backbone),
            "commit": _commit(getattr(details, "_commit_hash", None)),
            **(record.unloaded or backbone_identity(backbone, record)),
        },
        "num_parameters": num_parameters,
        **({"extras": {name: dict(extra.data()) for name, extra in record.extras.items()}} if record.extras else {}),
    }


def _commit(name: object) -> str | None:
    return name if isinstance(name, str) and re.fullmatch("[0-9a-f]{7,64}", name) else None


def backbone_identity(backbone: nn.Module, record: Record | None = None) -> dict[str, Any]:
    """Returns the class and the fingerprint of a backbone.

    The fingerprint omits the values of parameters that a delta on the backbone has changed. `record` is the delta being
    saved; its fully trained parameters are omitted even while it is detached.
    """
    changed = set(record.fully_trained) if record else set()
    for other in records_of(backbone):
        changed |= {*other.fully_trained, *other.weights_before_merge}
    return {"class": class_name(backbone), "fingerprint": fingerprint(backbone, leave_out=changed)}


def methods_of(entries: Sequence[MethodEntry], known: Paths, limit: int, where: str) -> list[tuple[Method, list[str]]]:
    """Returns the methods that a file describes, each with the paths of its targets.

    Args:
        known, limit: the backbone's paths, as for `expanded`.
        where: the folder or repository, for error messages.

    Raises:
        CheckpointError: if a method or an option is unknown to this deltakit or has a wrong type or value, or the targets
            stand for more paths than the backbone has.
    """
    found = []
    for number, entry in enumerate(entries):
        field = f"methods[{number}]"
        with from_file(where, f"{field}.targets"):
            paths = expanded(entry["targets"], known, limit)
        found.append((read_method(entry, where, field), paths))
    return found


def compact(paths: Sequence[str]) -> list[str]:
    """Returns folded selectors for the paths; `expanded` returns the same paths again.

    The paths stay as they are if names with commas or braces make folding ambiguous.
    """
    folded = list(fold(paths))
    try:
        same = sorted(expanded(folded, (), room_for(paths))) == sorted(paths)
    except SelectorError:
        same = False
    return folded if same else list(paths)


def room_for(paths: Collection[str]) -> int:
    """Returns the `limit` of `expanded` for a backbone with these paths: enough to name them all, folded or one by one."""
    # Twice, because a range may name what is then removed from it; and twice again, because of feature slices.
    return 4 * len(paths) * (2 + max((path.count(".") for path in paths), default=0))


def expanded(selectors: Sequence[str], known: Paths, limit: int) -> list[str]:
    """Returns the paths that folded selectors stand for. A selector that is one of the known paths stands for itself.

    Args:
        limit: see `expanded_each`.

    Raises:
        SelectorError: see `expanded_each`.
    """
    return expanded_each([selectors], known, limit)[0]


def expanded_each(lists: Iterable[Sequence[str]], known: Paths, limit: int) -> list[list[str]]:
    """Returns the paths that each of several lists of folded selectors stands for, as `expanded` does for one.

    Args:
        limit: how many names may be looked at in all. `{0-99999999999}` in a file of somebody else must not take hours.

    Raises:
        SelectorError: if the selectors stand for more, or one of them is malformed.
    """
    found: list[list[str]] = []
    for selectors in lists:
        paths: list[str] = []
        for selector in selectors:
            if selector in known:
                paths.append(selector)
                continue
            components = selector.split(".")
            limit -= sum(map(selector.count, ".,!"))
            limit -= sum(map(breadth, components)) if limit >= 0 else 0
            choices = [expand(component) for component in components] if limit >= 0 else []
            limit -= prod(map(len, choices))
            if limit < 0:
                raise SelectorError(f"{selector[:60]!r} stands for more paths than the backbone has")
            paths += [".".join(path) for path in product(*choices)]
        found.append(paths)
    return found
