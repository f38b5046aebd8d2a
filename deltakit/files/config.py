"""Builds and reads `delta_config.json`: the methods and their targets, the fully trained modules, and the backbone."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from torch import nn

from deltakit.core import Attachment, Method, Record, class_name, expand, fold, records_of
from deltakit.errors import CheckpointError
from deltakit.files.checkpoint import FORMAT_VERSION
from deltakit.files.fingerprint import fingerprint
from deltakit.version import __version__


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
            "id": getattr(details, "_name_or_path", None) or None,
            "commit": getattr(details, "_commit_hash", None),
            **backbone_identity(backbone, record),
        },
        "num_parameters": num_parameters,
    }


def backbone_identity(backbone: nn.Module, record: Record | None = None) -> dict[str, Any]:
    """Returns the class and the fingerprint of a backbone.

    The fingerprint omits the values of parameters that a delta on the backbone has changed. `record` is the delta being
    saved; its fully trained parameters are omitted even while it is detached.
    """
    changed = set(record.fully_trained) if record else set()
    for other in records_of(backbone):
        changed |= {*other.fully_trained, *other.weights_before_merge}
    return {"class": class_name(backbone), "fingerprint": fingerprint(backbone, leave_out=changed)}


def methods_of(config: Mapping[str, Any]) -> list[tuple[Method, list[str]]]:
    """Returns the methods that a config describes, each with the paths of its targets.

    Raises:
        CheckpointError: if a method or an option is unknown to this deltakit, or the config is damaged.
        OptionError: if an option of a method is out of its range.
    """
    found = []
    for entry in config["methods"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("targets"), list):
            raise CheckpointError(
                f"delta_config.json is damaged: expected a method with its targets, found {entry!r}; save or download it again"
            )
        method = Method.from_dict({key: value for key, value in entry.items() if key != "targets"})
        found.append((method, expanded(entry["targets"])))
    return found


def compact(paths: Sequence[str]) -> list[str]:
    """Returns folded selectors for the paths; `expanded` returns the same paths again.

    The paths stay as they are if names with commas or braces make folding ambiguous.
    """
    folded = list(fold(paths))
    return folded if sorted(expanded(folded)) == sorted(paths) else list(paths)


def expanded(selectors: Sequence[str]) -> list[str]:
    """Returns the paths that folded selectors stand for."""
    return [
        ".".join(components)
        for selector in selectors
        for components in product(*(expand(component) for component in selector.split(".")))
    ]
