"""Reads and writes the adapters of PEFT that the table describes."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from torch import Tensor, nn

from deltakit.core import Site
from deltakit.errors import CheckpointError, warn
from deltakit.files.formats.format import Parts
from deltakit.files.formats.layers import refuse_layer, target_options
from deltakit.files.formats.patterns import Patterns
from deltakit.files.formats.peft.row import Field, Options, Row
from deltakit.files.formats.shapes import refuse_integers
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing
from deltakit.files.schema import checked


def read_row(row: Row, source: Source, parts: Parts) -> None:
    """Adds the delta modules of an adapter to the parts.

    Raises:
        CheckpointError: if it has what deltakit does not have, its config is damaged, or a tensor is missing.
    """
    why = row.refuses(source.config)
    if why:
        raise CheckpointError(
            f"{source.folder}: this {row.peft_type} of PEFT {why}, which deltakit does not have; merge it into the backbone "
            "by PEFT's merge_and_unload()"
        )
    # What has a path may hold indices, too.
    matrices = {key: source.tensors[key] for key in (*row.shared, *row.consumed) if key in source.tensors}
    refuse_integers(matrices, source.folder)
    source = row.prepared(source)
    options_at, computed = _options(row, source), row.computed(source)
    by_ours = {stored.ours: stored for stored in row.tensors.values()}
    shared = {one.ours: one.read(source.tensors[key]) for key, one in row.shared.items() if key in source.tensors}
    holders: set[tuple[Any, ...]] = set()
    suffixes = {key: stored.ours for key, stored in row.tensors.items() if key not in row.shared}
    integers = {stored.ours for stored in row.tensors.values() if stored.integer}
    for path, raw in source.by_path(suffixes, integers).items():
        _check(row, source, path, raw.keys() | shared.keys())
        options = {**options_at(path), **computed(path, raw)}
        tensors = {ours: by_ours[ours].read(tensor) for ours, tensor in raw.items()}
        if tuple(options.items()) not in holders:
            # The first target of a method holds what all of them share.
            holders.add(tuple(options.items()))
            tensors |= shared
        parts.add(row.method, options, path, tensors)
    trained_with = [name for name in row.training_only if source.config.get(name)]
    if trained_with and source.backbone is not None:
        warn(
            f"{source.folder}: it was trained with {', '.join(trained_with)}, which deltakit does not have: outputs are the "
            "same, and training goes on without it"
        )


def _check(row: Row, source: Source, path: str, given: set[str]) -> None:
    missing = next((key for key, one in row.tensors.items() if one.ours not in given and not one.optional), None)
    if missing is not None:
        whole = missing if missing in row.shared else f"{path}{missing}"
        raise CheckpointError(f"{source.folder}: it has no {whole}; save or download it again")
    why = row.differs(source.module(path))
    if why:
        raise CheckpointError(
            f"{source.folder}: {path} {why}, where the {row.peft_type} of PEFT computes something else than deltakit's; merge "
            "it by PEFT's merge_and_unload()"
        )


def _options(row: Row, source: Source) -> Callable[[str], Options]:
    """Returns what gives the options at a path, as the config says.

    Raises:
        CheckpointError: if a field is of another type.
    """
    config, where = source.config, source.config_file
    values = {
        name: checked(config.get(name, field.default), field.kind, where, name) for name, field in row.fields.items()
    }
    patterns = {
        name: Patterns(
            checked(config.get(field.pattern), Optional[dict[str, field.kind]], where, field.pattern) or {},  # type: ignore[name-defined] # noqa: UP045
            where / field.pattern,
        )
        for name, field in row.fields.items()
        if field.pattern
    }

    def at(path: str) -> Options:
        found = {
            name: patterns[name].value_at(path, value) if name in patterns else value for name, value in values.items()
        }
        return {field.ours: field.read(found[name]) for name, field in row.fields.items()}

    return at


def write_row(row: Row, writing: Writing) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config of a delta, and its tensors by the names that PEFT has without its prefix.

    Raises:
        CheckpointError: if PEFT has no such adapter.
    """
    found: dict[str, Tensor] = {}
    sites = writing.attachment.sites
    targets: dict[str, nn.Module] = {}
    for site in sites:
        _refuse(row, writing, site)
        targets[site.path] = site.target
        for key, stored in row.tensors.items():
            name = writing.attachment.named(site, stored.ours)
            if name not in writing.tensors:
                continue
            whole = key if key in row.shared else f"{site.path}{key}"
            if whole in found:
                raise writing.impossible(f"it has two {row.method} that share {key} among others, and PEFT has one")
            found[whole] = stored.write(writing.tensors[name], site)
    found |= row.drawn(writing, sites)
    options: dict[str, Any] = {}
    for name, field in row.fields.items():
        options |= _written(writing, name, field)
    options |= target_options(writing.attachment.backbone, targets)
    if not row.layers.conv1d:
        # PEFT has no such field then.
        del options["fan_in_fan_out"]
    return options | row.written(writing, sites), found


def _refuse(row: Row, writing: Writing, site: Site) -> None:
    refuse_layer(writing, site, row.layers)
    if site.module.part:
        raise writing.impossible(f"{site.path} is a part of a module, and {row.peft_type} of PEFT has all of it")
    why = row.differs(site.target)
    if why:
        raise writing.impossible(f"{site.path} {why}, where PEFT's {row.peft_type} computes something else")


def _written(writing: Writing, name: str, field: Field) -> Options:
    """Returns a field of the config, and that of its patterns if the targets have different values."""
    methods: Sequence[Any] = writing.attachment.record.methods
    by_path: Mapping[str, Any] = {
        site.path: field.write(getattr(methods[site.method], field.ours)) for site in writing.attachment.sites
    }
    ((common, _),) = Counter(by_path.values()).most_common(1)
    others = {f"^{re.escape(path)}": value for path, value in by_path.items() if value != common}
    if others and not field.pattern:
        raise writing.impossible(f"its targets differ in {field.ours}, and PEFT has one {name} for all")
    return {name: common, **({field.pattern: others} if others else {})}
