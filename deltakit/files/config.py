"""What `delta_config.json` says: the methods and where they are, what is trained whole, and the backbone."""

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
    """The config of a delta as plain data: the selectors as written, and the paths that they resolved to."""
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
    """The class and the fingerprint of a backbone, without the values that its deltas changed."""
    changed = set(record.fully_trained) if record else set()
    for other in records_of(backbone):
        changed |= {*other.fully_trained, *other.weights_before_merge}
    return {"class": class_name(backbone), "fingerprint": fingerprint(backbone, leave_out=changed)}


def methods_of(config: Mapping[str, Any]) -> list[tuple[Method, list[str]]]:
    """The methods that a config describes, each with the paths of its targets.

    Raises:
        CheckpointError: if a method or an option is unknown here, or the config is damaged.
    """
    found = []
    for entry in config["methods"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("targets"), list):
            raise CheckpointError(f"the config is damaged: expected a method with its targets, found {entry!r}")
        method = Method.from_dict({key: value for key, value in entry.items() if key != "targets"})
        found.append((method, expanded(entry["targets"])))
    return found


def compact(paths: Sequence[str]) -> list[str]:
    """Paths as folded selectors that `expanded` turns into exactly these; one by one where names forbid folding."""
    folded = list(fold(paths))
    return folded if sorted(expanded(folded)) == sorted(paths) else list(paths)


def expanded(selectors: Sequence[str]) -> list[str]:
    """The paths that folded selectors stand for."""
    return [
        ".".join(components)
        for selector in selectors
        for components in product(*(expand(component) for component in selector.split(".")))
    ]
