"""`roles(model)`: which parts of a backbone have which role."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from deltakit.core import checked, fold, notebook_bundle
from deltakit.errors import RoleError, encodable, printable
from deltakit.selection.index import BackboneIndex
from deltakit.selection.role_inference.role_map import ROLES


@checked
@dataclass(frozen=True)
class RoleTable(Mapping[str, tuple[str, ...]]):
    """The paths of each role that a backbone has, by the role as a selector spells it: `@attn.q`.

    `untold` holds the roles whose feature slices cannot be determined, each with what to use instead. `repr` prints a
    table with folded paths.
    """

    owner: str
    answers: Mapping[str, tuple[str, ...]]
    untold: Mapping[str, str]

    def __getitem__(self, role: str) -> tuple[str, ...]:
        if not isinstance(role, str) or role not in self.answers:
            there = ", ".join(self.answers) or "none"
            wanted = repr(role) if isinstance(role, str) else type(role).__name__
            raise RoleError(f"roles[{wanted}]: {self.owner} has no such role; its roles are {there}")
        return self.answers[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def __repr__(self) -> str:
        lines = [f"roles on {self.owner}"]
        for role, paths in self.answers.items():
            first, *others = [selector or "(the backbone itself)" for selector in fold(paths)]
            lines.append(f"  {role:<13}{len(paths):>6}  {first}")
            lines += [" " * 23 + selector for selector in others]
        lines += [f"  {why}" for why in self.untold.values()]
        absent = [f"@{role}" for role in ROLES if f"@{role}" not in (*self.answers, *self.untold)]
        return encodable("\n".join(map(printable, [*lines, *([f"  none of {', '.join(absent)}"] if absent else [])])))

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_bundle(repr(self))


@checked
def roles(backbone: nn.Module) -> RoleTable:
    """Returns the paths of each role on a backbone. The backbone is not changed and may be on the meta device.

    >>> table = roles(nn.TransformerEncoderLayer(6, 2, 10))
    >>> table["@ff.up"], table["@attn.q"]
    (('linear1',), ('self_attn.in_proj_weight[q]',))

    Raises:
        TargetError: if the backbone is not a `torch.nn.Module`.
    """
    index = BackboneIndex(backbone)
    answers: dict[str, tuple[str, ...]] = {}
    untold: dict[str, str] = {}
    for role in ROLES:
        try:
            answers[f"@{role}"] = tuple(index.role(role))
        except RoleError as error:
            untold[f"@{role}"] = str(error)
    return RoleTable(index.owner, {role: paths for role, paths in answers.items() if paths}, untold)
