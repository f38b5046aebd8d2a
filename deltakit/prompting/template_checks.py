"""Checks of a template, before any example is seen."""

from collections.abc import Collection, Sequence

from torch import nn

from deltakit.errors import OptionError, did_you_mean
from deltakit.prompting.backbone_facts import Kind, kind_of, positions_of, vocabulary_of
from deltakit.prompting.pieces import Field, Piece, Slot, Text


def known_kind(backbone: nn.Module | None) -> Kind:
    """Returns the kind of the backbone.

    Raises:
        OptionError: if there is none.
        TargetError: if it does not show its kind.
    """
    if backbone is None:
        raise OptionError(
            "Template: without a backbone nothing says what it predicts; pass the backbone, or kind='mlm'"
        )
    return kind_of(backbone)


def first_soft_id(backbone: nn.Module | None) -> int:
    """Returns the first id behind the backbone's vocabulary.

    Raises:
        OptionError: if there is no backbone.
        TargetError: if it has no embedding.
    """
    if backbone is None:
        raise OptionError(
            "Template: soft tokens have the ids behind the backbone's vocabulary; pass the backbone as the third argument"
        )
    return vocabulary_of(backbone)


def check_positions(max_length: int | None, backbone: nn.Module | None) -> None:
    """Refuses examples that are longer than the backbone takes.

    Raises:
        OptionError: if they may be.
    """
    limit = None if backbone is None else positions_of(backbone)
    if limit is not None and max_length is not None and max_length > limit:
        raise OptionError(
            f"Template(max_length={max_length}): {type(backbone).__name__} has positions for {limit} tokens; pass at most "
            f"{limit}, or omit it"
        )


def check_slots(pieces: Sequence[Piece], kind: Kind) -> None:
    """Refuses a template without a slot, and a causal one that does not end at its only slot.

    Raises:
        OptionError: if it is one.
    """
    slots = [place for place, piece in enumerate(pieces) if isinstance(piece, Slot)]
    if not slots:
        raise OptionError('Template: it has no slot, so nothing is predicted; write {"mask"} where the answer stands')
    if kind != "causal":
        return
    if len(slots) > 1:
        raise OptionError(
            f"Template: a causal model predicts one slot, at the end, and this template has {len(slots)}; write a template "
            "with one slot, or use a masked or encoder-decoder model"
        )
    behind = pieces[slots[0] + 1 :]
    if any(not isinstance(piece, Text) or piece.text.strip() for piece in behind):
        raise OptionError(
            "Template: a causal model predicts the slot from the text ahead of it, and this template has text behind its slot "
            f"(column {pieces[slots[0]].column + 1}); move the slot to the end"  # type: ignore[union-attr]
        )


def check_filters(pieces: Sequence[Piece], filters: Collection[str]) -> None:
    """Refuses a template that names a filter which was not given.

    Raises:
        OptionError: if it does.
    """
    for piece in pieces:
        name = piece.filter if isinstance(piece, Field) else None
        if name is not None and name not in filters:
            known = ", ".join(map(repr, filters)) or "none"
            raise OptionError(
                f"Template: column {piece.column + 1}: no filter {name!r} was given, only {known}"  # type: ignore[union-attr]
                f"{did_you_mean(name, filters)}; pass Template(..., filters={{{name!r}: function}})"
            )
