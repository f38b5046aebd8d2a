"""Roles: what the parts of a backbone are for, the same words on every architecture."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
"""All roles there are."""


@dataclass(frozen=True)
class Unit:
    """One attention or one feed-forward part of a block.

    `path` is the smallest module that holds all its projections; `own` says whether that is more than the block itself,
    `cross` whether it attends to another stack.
    `parts` gives the projections' paths by their role: modules, or parameters where no module is called. `width` is the
    size of the hidden states around.
    """

    kind: str
    path: str
    width: int | None
    parts: Mapping[str, str]
    own: bool = True
    cross: bool = False


@dataclass(frozen=True)
class RoleMap:
    """What answers each role on one backbone, as paths in the order of `named_modules()`."""

    units: tuple[Unit, ...]
    blocks: tuple[str, ...]
    norms: tuple[str, ...]
    embed: tuple[str, ...]
    head: tuple[str, ...]
    order: Mapping[str, int] = field(repr=False)

    def paths(self, role: str) -> tuple[str, ...]:
        """The paths that answer a role such as `attn.q`, `ff` or `norm`; possibly none.

        Raises:
            RoleError: if there is no such role.
        """
        plain = {"block": self.blocks, "norm": self.norms, "embed": self.embed, "head": self.head}
        if role in plain:
            return plain[role]
        kind, _, part = role.partition(".")
        if kind not in PARTS or (part and part not in PARTS[kind]):
            raise RoleError(f"there is no role '@{role}'; there are {', '.join('@' + name for name in ROLES)}")
        hits = [path for unit in self.units if unit.kind == kind for path in _answer(unit, part)]
        return tuple(sorted(dict.fromkeys(hits), key=self.rank))

    def rank(self, path: str) -> int:
        """The place of a path in the order of modules; that of its owner for a parameter."""
        path = path.partition("[")[0]
        return self.order[path] if path in self.order else self.order[path.rpartition(".")[0]]


def _answer(unit: Unit, part: str) -> list[str]:
    if part in ("", "self", "cross"):
        wanted = {"": True, "self": not unit.cross, "cross": unit.cross}[part]
        return [unit.path] if unit.own and wanted else []
    return [unit.parts[part]] if part in unit.parts else []
