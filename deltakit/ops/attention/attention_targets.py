"""Finds the attention modules that methods on attention take: all of a backbone, or those at or below selected modules."""

from collections.abc import Sequence

from deltakit.core import BackboneView, Target, above
from deltakit.errors import RoleError, TargetError
from deltakit.ops.attention.sites import attends


def attention_targets(index: BackboneView, selected: Sequence[Target] | None, method: str) -> list[Target]:
    """Returns the attention modules at or below the selected targets; all of them without a selection.

    Args:
        method: the name of the method, for error messages.

    Raises:
        RoleError: if the backbone has no attention.
        TargetError: if a selected target has no attention at or below it.
    """
    paths = [path for path, module in index.by_path.items() if attends(module)]
    if selected is None:
        if not paths:
            raise RoleError(
                f"{method}: {index.owner} has no attention whose keys and values can be extended, so there is no default "
                "position; use another method, such as LoRA"
            )
        return [index.target(path) for path in paths]
    inside: dict[str, list[str]] = {}
    for path in paths:
        for around in above(path):
            inside.setdefault(around, []).append(path)
    found = []
    for target in selected:
        below = inside.get(target.path)
        if below is None:
            raise TargetError(
                f"{target.named}: this {type(target.module).__name__} has no attention in it, and {method} needs one; this "
                f"backbone has attention at {', '.join(paths[:3]) or 'no path'}"
            )
        found += [index.target(path) for path in below]
    return found
