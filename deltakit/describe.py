"""What a delta is and in which states, in words."""

from collections.abc import Mapping, Sequence

from torch import nn

from deltakit.freeze import own_parameters
from deltakit.modules import Modules
from deltakit.report import Line, report, share
from deltakit.state import Record, Site
from deltakit.values import named_parameters


def described(backbone: nn.Module, record: Record, sites: Sequence[Site], *, attached: bool) -> str:
    """A delta as a report: its states, each method with its targets, and how many parameters it trains."""
    names = Modules(backbone).names
    own = dict(own_parameters(backbone))
    total = sum(parameter.numel() for parameter in own.values())
    trained = sum(parameter.numel() for _, parameter in named_parameters(backbone, record, sites))
    return report(
        f"delta {record.name!r} on {type(backbone).__name__}: {states(record, attached=attached)}",
        [_line(record, sites, index, names) for index in range(len(record.methods))],
        {name: own[name] for name in record.whole if name in own},
        f"{trained:,} parameters, {share(trained, total)} of the backbone's {total:,}",
    )


def states(record: Record, *, attached: bool) -> str:
    """The states of a delta: `attached, active, not trainable`."""
    words = [
        word if on else f"not {word}"
        for word, on in (("attached", attached), ("active", record.active), ("trainable", record.trainable))
    ]
    words += [f"scale {record.scale:g}"] if record.scale != 1 else []
    return ", ".join(words + (["merged"] if record.merged else []))


def _line(record: Record, sites: Sequence[Site], index: int, names: Mapping[int, list[str]]) -> Line:
    own = [site for site in sites if site.method == index]
    return Line(
        record.methods[index].name,
        next((site.module.summary() for site in own), ""),
        [site.path for site in own],
        sum(p.numel() for site in own for p in site.module.parameters()),
        by_weight=[site.path for site in own if site.module.reading is not None],
        aliases=list(dict.fromkeys(name for site in own for name in names.get(id(site.target), [])[1:])),
    )
