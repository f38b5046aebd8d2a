"""Builds the text of plans and of a delta's `repr`: what is attached where."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from deltakit.core import Attachment, fold, named_logical_parameters, tensors_of
from deltakit.errors import printable

_GONE = "no longer in the backbone: replaced or removed"


class Line(NamedTuple):
    """One method of a delta: its name and configuration, the paths of its targets, and its number of parameters."""

    method: str
    summary: str
    paths: Sequence[str]
    parameters: int
    patched: Sequence[str] = ()
    """The paths at which it uses a weight patch instead of an output hook."""
    left_out: Mapping[str, str] = MappingProxyType({})
    """Paths that the method cannot serve, at default positions or in a selected container, each with the reason."""
    aliases: Sequence[str] = ()
    """Other paths of the same module instances."""
    note: str = ""
    """What is unusual about the choice of the paths."""
    gone: Collection[str] = ()
    """The paths whose module the user has replaced or removed."""
    known: bool = True
    """Whether the paths are known. Only a backbone shows those of some files."""
    remarks: Sequence[str] = ()
    """What may be a mistake, one sentence each."""


def report(
    head: str,
    lines: Iterable[Line],
    fully_trained: Mapping[str, Tensor],
    foot: str,
    total: int | None,
    statistics: Mapping[str, Tensor] | None = None,
    gone: Collection[str] = (),
) -> str:
    """Returns the text of a report.

    It has the head, for each method its size and its targets with paths folded, the fully trained tensors, the running
    statistics that the delta holds, and the foot.

    Args:
        total: the number of the backbone's parameters; None if it is not known.
        gone: the modules that the user has replaced or removed, besides those on the lines.
    """
    text = [head]
    for line in lines:
        targets = f"{len(line.paths) if line.known else '?'} target{'s' if len(line.paths) != 1 else ''}"
        text.append(f"  {' '.join((line.method, line.summary)).strip():<32} {targets:>12}  +{line.parameters:,}")
        patched = set(line.patched)
        there = [path for path in line.paths if path not in line.gone]
        by_output = [path for path in there if path not in patched]
        text += [f"      {selector or '(the backbone itself)'}" for selector in fold(by_output)]
        text += [f"      {selector}  weight patch" for selector in fold([path for path in there if path in patched])]
        text += [f"      {selector}  {_GONE}" for selector in fold([path for path in line.paths if path in line.gone])]
        text += [f"      {selector}  the same instances" for selector in fold(line.aliases)]
        for why in dict.fromkeys(line.left_out.values()):
            left_out = [path for path, reason in line.left_out.items() if reason == why]
            text += [f"      {selector}  left out: {why}" for selector in fold(left_out)]
        text += [f"      ({line.note})"] if line.note else []
        text += [f"      ! {remark}" for remark in line.remarks]
    for title, held in (("fully trained", fully_trained), ("running statistics", statistics)):
        if held:
            values = sum(tensor.numel() for tensor in held.values())
            part = f", {share(values, total)} of the backbone" if title == "fully trained" and total is not None else ""
            text.append(f"  {title:<32} {'':>12}   {values:,}{part}")
            text += [f"      {selector}" for selector in fold(held)]
    text += [f"  {selector}  {_GONE}" for selector in fold(gone)]
    return "\n".join(map(printable, [*text, foot]))


def share(part: int, total: int) -> str:
    """Returns a share in percent with three significant digits, or with more where it is above 1,000 %.

    >>> share(147_456, 22_860_672), share(20_460, 66)
    ('0.645 %', '31,000 %')
    """
    percent = 100 * part / total if total else 0.0
    return f"{percent:.3g} %" if percent < 999.5 else f"{percent:,.0f} %"


def described(
    attachment: Attachment,
    *,
    trained: int,
    names: Mapping[int, list[str]],
    full: Mapping[str, Tensor],
    saved: Collection[int],
    gone: Collection[str],
) -> str:
    """Returns a delta as a report: its states, each method with its targets, and its number of parameters.

    Args:
        trained: the number of parameters that the delta trains.
        names: all paths of each module of the backbone, by the module's id.
        full: the parameters that the delta fully trains, by name.
        saved: the ids of the backbone's tensors that any attached delta saves.
        gone: the paths of the delta's modules that the user has replaced or removed.
    """
    record = attachment.record
    buffers = {name for name, tensor in tensors_of(attachment.backbone) if not isinstance(tensor, nn.Parameter)}
    logical = dict(named_logical_parameters(attachment.backbone))
    total = sum(parameter.numel for parameter in logical.values())
    foot = f"{trained:,} parameters, {share(trained, total)} of the backbone's {total:,}"
    unsaved = sum(p.numel for p in logical.values() if p.stored.requires_grad and id(p.stored) not in saved)
    if attachment.attached and unsaved:
        foot += f"; {unsaved:,} more of the backbone's are not frozen, and are not saved with the delta"
    return report(
        f"delta {record.name!r} on {type(attachment.backbone).__name__}: {states(attachment)}",
        [_line(attachment, index, names, gone) for index in range(len(record.methods))],
        full,
        foot,
        total,
        {name: tensor for name, tensor in (record.backbone_values or record.trained_values).items() if name in buffers},
        sorted({*gone} - {site.owner for site in attachment.sites}),
    )


def states(attachment: Attachment) -> str:
    """Returns the states of a delta as text: `attached, active, not trainable`."""
    record = attachment.record
    words = [
        word if on else f"not {word}"
        for word, on in (("attached", attachment.attached), ("active", record.active), ("trainable", record.trainable))
    ]
    words += [f"scale {record.scale:g}"] if record.scale != 1 else []
    return ", ".join(words + (["merged"] if record.merged else []))


def _line(attachment: Attachment, index: int, names: Mapping[int, list[str]], gone: Collection[str]) -> Line:
    own = [site for site in attachment.sites if site.method == index]
    return Line(
        attachment.record.methods[index].name,
        next((site.module.summary() for site in own), ""),
        [site.path for site in own],
        sum(p.numel() for site in own for _, p, _ in site.module.trained_parameters()),
        patched=[site.path for site in own if site.module.weight_read is not None],
        left_out=dict(attachment.record.left_out[index]) if attachment.record.left_out else {},
        aliases=list(dict.fromkeys(name for site in own for name in names.get(id(site.target), [])[1:])),
        note=attachment.record.notes[index] if attachment.record.notes else "",
        gone={site.path for site in own if site.owner in gone},
    )
