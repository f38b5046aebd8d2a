"""What every method declares and can do. Its abilities are found by trying it on a small backbone."""

import inspect
import re
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields

from torch import nn

from deltakit.core import METHODS, Attachment, DeltaModule, Design, Method, same_random_numbers
from deltakit.delta.attaching import attach
from deltakit.delta.combining import combine
from deltakit.delta.handle import Delta
from deltakit.delta.sample_backbone import SampleBackbone
from deltakit.errors import DeltaError, OptionError, TargetError, did_you_mean
from deltakit.selection import roles
from deltakit.view import MethodRow

_OF_ALL = ("at", "of", "exclude")
"""The options of every method."""
_NAME = r"[A-Z][\w'-]+(?: [A-Z][\w'-]+)*"
_WHO = rf"({_NAME}(?: et al\.| and {_NAME})? \d{{4}})"
_ADDRESS = r"(https?://[^\s,;)]*[^\s,;.)])"
_SOURCES = (rf"{_WHO}(?: \([^)]*\))?,? \(?{_ADDRESS}", _WHO, _ADDRESS)
"""Authors and year, and an address, as docstrings of methods have them; or one of the two."""


def method_rows(names: Sequence[str] = ()) -> list[MethodRow]:
    """Returns a row for each of these methods, by default for all that are registered, in alphabetical order.

    >>> method_rows(["lora"])[0].positions
    ['@attn.{q,v}']

    Raises:
        OptionError: if there is no method of a name.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise OptionError(
            f"unknown method {unknown[0]!r}: expected one of {', '.join(sorted(METHODS))}"
            + did_you_mean(unknown[0], METHODS)
        )
    with same_random_numbers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [_row(METHODS[name]) for name in sorted(names or METHODS)]


def _row(kind: type[Method]) -> MethodRow:
    identity, source = "yes" if kind.identity else "no", _source(kind)
    own = {field.name: field.default for field in fields(kind) if field.name not in _OF_ALL}
    try:
        method = kind(**kind.example)
        delta = attach(_sample(method), method)
    except (DeltaError, TypeError):
        # A stranger's method may have required options without an example, or need another backbone.
        design, positions, merged, summed, mixed = kind.design.over(kind.kind.design), [], "", "", ""
    else:
        attachment = delta._attachment
        design, positions = _design(kind, attachment), _positions(attachment)
        # A weight is the same for all examples of a batch.
        apart = all(site.module.mixable and site.module.weight_read is None for site in attachment.sites)
        mixed = "yes" if apart else "no"
        summed, merged = _sums(delta), _merges(delta)
    return MethodRow(
        name=kind.name,
        design=design,
        positions=positions,
        merged=merged,
        summed=summed,
        mixed=mixed,
        identity=identity,
        source=source,
        options={
            name: list(value) if isinstance(value, tuple) else value
            for name, value in own.items()
            if value is not MISSING
        },
        required=[name for name, value in own.items() if value is MISSING],
    )


def _sample(method: Method) -> SampleBackbone:
    """Returns a backbone with deltas of the names that a method weighs: some of their targets can be merged."""
    backbone = SampleBackbone()
    for name in method.weighed:
        attach(backbone, METHODS["adapter"](), METHODS["lora"](), name=name).active = False
    return backbone


def _design(kind: type[Method], attachment: Attachment) -> Design:
    # Modules without parameters only help others, such as by handing over an input.
    modules = [site.module for site in attachment.sites]
    return kind.design.over(next((module for module in modules if module.parameters_read()), modules[0]).design)


def _positions(attachment: Attachment) -> list[str]:
    """Returns selectors of the roles of the targets, such as "@attn.{q,v}"."""
    # Modules that only help others, such as by inserting ids, have no parameters, and shared ones stand at one target.
    sites = [site for site in attachment.sites if site.module.parameters_read()] or attachment.sites
    paths = {site.owner for site in sites}
    parts: dict[str, list[str]] = {}
    seen: set[str] = set()
    for role, there in roles(attachment.backbone).items():
        # A narrower role, such as "@attn.self", may have no other modules than one ahead of it.
        if paths.intersection(there) - seen:
            seen.update(there)
            whole, _, part = role.partition(".")
            parts.setdefault(whole, []).append(part)
    return [
        f"{whole}.{{{','.join(found)}}}" if len(found) > 1 else f"{whole}.{found[0]}".rstrip(".")
        for whole, found in parts.items()
    ]


def _merges(delta: Delta) -> str:
    try:
        delta.merge()
    except TargetError:
        return "partly" if any(_has_updates(site.module, site.target) for site in delta._attachment.sites) else "no"
    return "yes"


def _has_updates(module: DeltaModule, target: nn.Module) -> bool:
    try:
        return bool(module.weight_updates(target))
    except TargetError:
        return False


def _sums(delta: Delta) -> str:
    try:
        combine(delta.backbone, {delta: 0.5})
    except TargetError:
        return "no"
    return "yes"


def _source(kind: type[Method]) -> str:
    """Returns authors, year and address of the first paper in the docstring of the method's class or of its file.

    It is only one of the two where nothing has both, and "" where there is neither.
    """
    module = inspect.getmodule(kind)
    # The options may have papers of their own.
    texts = [" ".join((text or "").partition("Args:")[0].split()) for text in (kind.__doc__, module and module.__doc__)]
    for pattern in _SOURCES:
        for text in texts:
            found = re.search(pattern, text)
            if found:
                return ", ".join(found.groups())
    return ""
