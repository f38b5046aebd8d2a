"""Roles: names for the parts of a backbone that are the same on every architecture."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from deltakit.core import split_slice
from deltakit.errors import RoleError

PARTS = {
    "attn": ("q", "k", "v", "kv", "qkv", "q_a", "kv_a", "o", "self", "cross"),
    "ff": ("up", "gate", "gate_up", "down"),
}

ROLES = (
    "block",
    *(f"{kind}.{part}" if part else kind for kind, parts in PARTS.items() for part in ("", *parts)),
    *("norm", "embed", "head"),
)
"""All roles."""


@dataclass(frozen=True)
class Unit:
    """One attention or feed-forward part of a block.

    `kind` is "attn" or "ff", and `path` the smallest module that holds all its projections. `width` is the hidden size
    around it in elements. `parts` are the projections' paths by role: modules, or parameters if no module is called. `own`
    is False if `path` is the block itself. `cross` is True for attention to another stack.
    """

    kind: str
    path: str
    width: int | None
    parts: Mapping[str, str]
    own: bool = True
    cross: bool = False


@dataclass(frozen=True)
class RoleMap:
    """The paths of each role on one backbone, in the order of `named_modules()`."""

    units: tuple[Unit, ...]
    blocks: tuple[str, ...]
    norms: tuple[str, ...]
    embed: tuple[str, ...]
    head: tuple[str, ...]
    order: Mapping[str, int] = field(repr=False)

    def paths(self, role: str) -> tuple[str, ...]:
        """Returns the paths that have a role such as `attn.q`, `ff` or `norm`. The result may be empty.

        Raises:
            RoleError: if there is no such role.
        """
        plain = {"block": self.blocks, "norm": self.norms, "embed": self.embed, "head": self.head}
        if role in plain:
            return plain[role]
        kind, dot, part = role.partition(".")
        if kind not in PARTS or (dot and part not in PARTS[kind]):
            raise RoleError(f"there is no role '@{role}'; use one of {', '.join('@' + name for name in ROLES)}")
        hits = [path for unit in self.units if unit.kind == kind for path in _answer(unit, part)]
        return tuple(sorted(dict.fromkeys(hits), key=self.rank))

    def rank(self, path: str) -> int:
        """Returns the position of a path among the modules; a parameter has the position of its module."""
        path, _ = split_slice(path, self.order)
        return self.order[path] if path in self.order else self.order[path.rpartition(".")[0]]


def _answer(unit: Unit, part: str) -> list[str]:
    if part in ("", "self", "cross"):
        wanted = {"": True, "self": not unit.cross, "cross": unit.cross}[part]
        return [unit.path] if unit.own and wanted else []
    return [unit.parts[part]] if part in unit.parts else []
